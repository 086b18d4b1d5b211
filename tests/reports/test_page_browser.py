"""The HTML report in a real browser: it complains of nothing, draws every figure, and shows the aggregate's numbers."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from pyarrow import parquet

from core_torl.reports.page import write_page
from core_torl.reports.story import Story
from tests.reports.chromium import Chromium, drawn_share, find_chromium
from tests.reports.pages import ATTACK, check_numbers, hostile, story_of, sweep

pytestmark = pytest.mark.slow

DRAWN = 0.005  # share of a figure's pixels that are not its ground; an empty panel with its axes has more


@pytest.fixture
def story(tmp_path: Path) -> Story:
    return story_of(sweep(tmp_path / "sweep"), tmp_path / "figures")


@pytest.fixture(scope="module")
def chromium(tmp_path_factory):
    program = find_chromium()
    if program is None:
        pytest.skip("NO BROWSER: none of chromium, chromium-browser, google-chrome is on PATH; the page was not opened")
    with Chromium(program, tmp_path_factory.mktemp("profile")) as browser:
        yield browser


def check_drawn(browser: Chromium) -> None:
    """No complaint, and every figure has a size and pixels of more than one colour."""
    assert browser.errors == []
    boxes = browser.boxes("figure svg")
    assert boxes, "no figures"
    for number, box in enumerate(boxes, start=1):
        assert box["width"] > 100 and box["height"] > 50, f"figure {number} has no size: {box}"
        share = drawn_share(browser.screenshot(box))
        assert share > DRAWN, f"figure {number} is blank: {share:.4f} of its pixels are drawn"


@pytest.mark.parametrize(("width", "dark"), [(1280, False), (1280, True), (400, False)])
def test_a_browser_draws_every_figure_without_a_complaint(story: Story, tmp_path: Path, chromium, width, dark):
    write_page(story, tmp_path / "page.html")
    chromium.open(tmp_path / "page.html", width, dark=dark)
    check_drawn(chromium)
    assert chromium.run("document.documentElement.scrollWidth") <= width, "the page itself never scrolls sideways"


def test_numbers_that_the_browser_has_are_those_of_the_parquet(story: Story, tmp_path: Path, chromium):
    parquet.write_table(story.runs, tmp_path / "runs.parquet")
    write_page(story, tmp_path / "page.html")
    chromium.open(tmp_path / "page.html")
    found = chromium.run(
        "[...document.querySelectorAll('[data-metric]')].map(e => Object.fromEntries([...e.attributes]"
        ".filter(a => a.name.startsWith('data-')).map(a => [a.name, a.value])))"
    )
    check_numbers(found, dataclasses.replace(story, runs=parquet.read_table(tmp_path / "runs.parquet")))
    # And a person sees the same, rounded.
    shown = chromium.run(
        "[...document.querySelectorAll('#main-table [data-metric^=\"after/\"] .value')]"
        ".map(e => [e.textContent, e.parentElement.dataset.value])"
    )
    assert len(shown) == 8 and all(text == f"{100 * float(value):.1f}" for text, value in shown)


def test_the_page_of_a_report_has_the_numbers_of_its_own_parquet(tmp_path: Path, front_door, chromium):
    """What the front door wrote, in one call: both files must tell the same of every run and of every cell."""
    top = sweep(tmp_path / "sweep")
    arguments = (f"runs={top}", "baseline=base", f"output={tmp_path / 'out'}", f"hydra.run.dir={tmp_path / 'h'}")
    assert front_door("report", *arguments) == 0
    rows = parquet.read_table(tmp_path / "out" / "runs.parquet").to_pylist()
    chromium.open(tmp_path / "out" / "report.html")
    check_drawn(chromium)
    found = chromium.run(
        "[...document.querySelectorAll('[data-run],[data-cell]')].map(e => "
        "[e.dataset.run || '', e.dataset.cell || '', e.dataset.metric, Number(e.dataset.value)])"
    )
    of_run = {(run, metric): value for run, _, metric, value in found if run}
    of_cell = {(cell, metric): value for _, cell, metric, value in found if cell}
    labels = [f"after/{name}/greedy/{m}" for name in ("gap", "mastered") for m in ("accuracy", "robust_accuracy")]
    for row in rows:
        assert {label: of_run[row["run"], label] for label in labels} == {label: row[label] for label in labels}
        assert of_run[row["run"], "sampled_tokens"] == row["last/train/sampled_tokens"]
    for cell in ("base", "core/kl"):
        own = [row for row in rows if row["group/experiment"] == cell]
        assert len(own) == 3
        for label in labels:
            mean = sum(row[label] for row in own) / len(own)
            assert of_cell[cell, label] == pytest.approx(mean, abs=1e-12)
        tokens = sum(row["last/train/sampled_tokens"] for row in own) / len(own)
        assert of_cell[cell, "sampled_tokens"] == pytest.approx(tokens)
    assert {run for run, *_ in found if run} == {row["run"] for row in rows}


def test_a_table_is_sorted_by_a_click_and_its_first_row_stays(story: Story, tmp_path: Path, chromium):
    write_page(story, tmp_path / "page.html")
    chromium.open(tmp_path / "page.html")
    labels = "[...document.querySelectorAll('#main-table tbody th')].map(e => e.textContent.trim().split(' ')[0])"
    assert chromium.run(labels) == ["before", "base", "core/kl"]
    click = "document.querySelectorAll('#main-table thead th')[5].querySelector('button').click()"
    chromium.run(click)
    assert chromium.run(labels) == ["before", "core/kl", "base"]
    chromium.run(click)
    assert chromium.run(labels) == ["before", "base", "core/kl"]
    light = chromium.run("getComputedStyle(document.body).backgroundColor")
    chromium.run("document.querySelector('.theme').click()")
    assert chromium.run("getComputedStyle(document.body).backgroundColor") != light
    assert chromium.errors == []


def test_no_attack_is_executed(tmp_path: Path, chromium):
    write_page(hostile(tmp_path), tmp_path / "page.html")
    chromium.open(tmp_path / "page.html")
    check_drawn(chromium)
    assert "Page.javascriptDialogOpening" not in chromium.events
    assert chromium.run("document.querySelectorAll('script').length") == 1
    assert chromium.run("document.querySelector('h1').textContent").startswith(ATTACK)


def test_a_script_that_got_into_the_page_would_not_run(story: Story, tmp_path: Path, chromium):
    """The second wall: with the escaping gone the browser still refuses, and says so."""
    write_page(story, tmp_path / "page.html")
    source = (tmp_path / "page.html").read_text()
    (tmp_path / "page.html").write_text(source.replace("<h1>", "<h1><script>window.attacked = 1</script>"))
    chromium.open(tmp_path / "page.html")
    assert chromium.run("window.attacked === undefined") and "Content Security Policy" in " ".join(chromium.errors)


def test_the_checks_see_a_blank_figure_and_a_complaint(story: Story, tmp_path: Path, chromium):
    """Negative controls: what the checks above are for must fail them."""
    blank = tmp_path / "blank.svg"
    blank.write_text('<svg xmlns="http://www.w3.org/2000/svg" width="700pt" height="300pt" viewBox="0 0 700 300"/>')
    write_page(dataclasses.replace(story, figures={**story.figures, "nothing": blank}), tmp_path / "page.html")
    chromium.open(tmp_path / "page.html")
    with pytest.raises(AssertionError, match="figure 3 is blank"):
        check_drawn(chromium)
    write_page(story, tmp_path / "page.html")
    chromium.open(tmp_path / "page.html")
    check_drawn(chromium)
    chromium.run("document.querySelector('figure').style.display = 'none'")
    with pytest.raises(AssertionError, match="figure 1 has no size"):
        check_drawn(chromium)
    for complaint in ("console.error('wrong')", "setTimeout(() => { throw new Error('wrong'); })"):
        chromium.open(tmp_path / "page.html")
        chromium.run(complaint)
        chromium.run("new Promise(done => setTimeout(() => done(true), 50))")
        with pytest.raises(AssertionError, match="wrong"):
            check_drawn(chromium)
