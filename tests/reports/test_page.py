"""The HTML report: its numbers are those of the comparison, foreign text stays text, and figures keep their ids apart."""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import json
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from core_torl.config.errors import UserError
from core_torl.reports.page_figures import inline_svg
from core_torl.reports.page_samples import before_and_after, marked_pieces, pieces
from core_torl.reports.page_tables import main_table, significant_side
from core_torl.reports.story import Story
from core_torl.tracking import comparison_table as tables
from core_torl.tracking.samples import END, OBSERVATION
from tests.reports.pages import (
    ATTACK,
    HEADLINE,
    add_results,
    check_numbers,
    hostile,
    rollouts,
    story_of,
    sweep,
    written,
)


@pytest.fixture
def story(tmp_path: Path) -> Story:
    return story_of(sweep(tmp_path / "sweep"), tmp_path / "figures")


# ---- numbers -----------------------------------------------------------------------------------------------------


def test_numbers_are_those_of_comparison_and_aggregate(story: Story, tmp_path: Path):
    page = written(story, tmp_path)
    found = page.having("data-value", "data-metric")
    check_numbers(found, story)
    found[[one.get("data-metric") for one in found].index("difference")]["data-value"] = "0.123"
    with pytest.raises(AssertionError):
        check_numbers(found, story)  # the check sees a wrong number


def test_table_has_the_heads_rows_and_legend_of_the_markdown(story: Story, tmp_path: Path):
    page, (heads, texts) = written(story, tmp_path), tables.table(story.comparison)
    found_heads, rows = main_table(story.comparison)
    assert found_heads == heads
    assert [[row.label, *(one.text for one in row.numbers)] for row in rows] == texts
    for line in [*tables.legend(story.comparison), *heads]:
        assert line in page.text
    for row in texts:
        assert all(text in page.text for text in row)
    assert rows[0].fixed and rows[0].numbers[3].metric == "before/gap/greedy/accuracy"


def test_what_is_significant_after_holm_is_marked_and_nothing_else(story: Story, tmp_path: Path):
    page = written(story, tmp_path)
    assert [one["data-significant"] for one in page.having("data-significant")] == ["above"]
    assert "1 of 1 cell differs from base" in page.text
    cell = story.comparison["cells"][1]
    assert cell["paired"]["p_holm"] < 0.05 and significant_side(cell, 0.95) == "above"
    cell["paired"]["p_holm"] = 0.05
    page = written(story, tmp_path)
    assert not page.having("data-significant") and "No cell differs from base" in page.text
    assert significant_side(story.comparison["cells"][0], 0.95) is None, "the baseline has nothing to differ from"


def test_without_a_baseline_nothing_is_said_of_significance(tmp_path: Path):
    page = written(story_of(sweep(tmp_path / "s"), tmp_path / "f", baseline=None), tmp_path)
    assert "Holm" not in page.text and "compared with" not in page.text


def test_second_table_where_it_was_asked_for(story: Story, tmp_path: Path):
    assert not [one for one in written(story, tmp_path).having("id") if one["id"] == "final-table"]
    first, last = story.comparison["cells"][0]["after"][HEADLINE], story.comparison["cells"][1]["after"][HEADLINE]
    rows = [{"cell": cell["label"], "first": first, "last": last} for cell in story.comparison["cells"]]
    comparison = {**story.comparison, "final": {"steps": 10, "metrics": {"reward/accuracy": rows}}}
    page = written(dataclasses.replace(story, comparison=comparison), tmp_path)
    found = [one for one in page.having("data-cell") if one["data-metric"] == "last/reward/accuracy"]
    assert [(one["data-cell"], float(one["data-value"] or "")) for one in found] == [
        ("base", last.value),
        ("core/kl", last.value),
    ]
    assert tables.final_legend(comparison) in page.text


def test_runs_that_are_not_in_the_table_stand_in_a_box_above_it(tmp_path: Path):
    top = sweep(tmp_path / "sweep")
    assert not written(story_of(top, tmp_path / "f"), tmp_path).having("data-absent")
    (top / "dead" / ".hydra").mkdir(parents=True)
    (top / "dead" / ".hydra" / "config.yaml").write_text("rl_steps: 20\n")
    record = {"app": "train", "state": "failed", "error": "it ran out of memory", "attempts": []}
    (top / "dead" / "run.json").write_text(json.dumps(record))
    page = written(story_of(top, tmp_path / "f"), tmp_path)
    assert [one["data-absent"] for one in page.having("data-absent")] == [str(top / "dead")]
    assert page.source.index("data-absent") < page.source.index('id="main-table"')
    assert "1 run is not in the table" in page.text and "it ran out of memory" in page.text
    assert "6 completed" in page.text and "1 failed" in page.text


def test_a_run_that_only_the_aggregate_knows_is_absent_too(story: Story, tmp_path: Path):
    import pyarrow as pa

    rows = [*story.runs.to_pylist(), {"run": "x", "folder": "/x", "state": "pending", "why": "not begun"}]
    page = written(dataclasses.replace(story, runs=pa.Table.from_pylist(rows)), tmp_path)
    assert [one["data-absent"] for one in page.having("data-absent")] == ["/x"]


# ---- facts -------------------------------------------------------------------------------------------------------


def test_what_was_run_is_told_once_with_how_many_runs_it_holds_for(tmp_path: Path):
    top = sweep(tmp_path / "sweep")
    for i, folder in enumerate(sorted(top.iterdir())):
        made = {
            "command": "core-torl-train seed=7", "commit": "abc123", "dirty": i == 0, "diff_sha256": "d1f", "cpus": 3,
            "version": "0.1.0", "packages": {"torch": "2.13"}, "python": "3.11.7", "machine": "x86_64",
            "seeds": {"seed": i, "evaluation.seed": 42}, "data": {"train": {"problems": 99, "sha256": "5ha"}},
        }  # fmt: skip
        cost = {"wall_s": 3600.0, "train_s": 1800.0, "cpus": 2, "gpus": ["H200", "H200"], "sampled_tokens": 1000,
                "samples": 10, "attempts": 2}  # fmt: skip
        add_results(folder, provenance=made, compute=cost)
    page = written(story_of(top, tmp_path / "f"), tmp_path)
    assert "core-torl-train seed=7" in page.text
    assert "abc123, clean 5 of 6 runs" in page.text
    assert "abc123, with changes that are in no commit (sha256 d1f) 1 of 6 runs" in page.text
    assert "torch 2.13" in page.text and "evaluation.seed 42" in page.text and "all cells 0, 1, 2" in page.text
    assert "train 99 5ha 6" in page.text
    total = {o["data-metric"]: o["data-value"] for o in page.having("data-compute") if o["data-compute"] == "all runs"}
    assert total["wall_s"] == "21600.0" and total["attempts"] == "12.0" and total["sampled_tokens"] == "6000.0"
    assert "6 h 00 min" in page.text and "2 CPUs, 2 x H200" in page.text
    assert re.findall("(?i)not recorded[^.]*", page.text) == ["Not recorded: RL steps"], "no run has logged rows here"
    (top / "sweep.json").write_text(json.dumps({"command": "core-torl-train -cn smoke", "jobs": []}))
    page = written(story_of(top, tmp_path / "f"), tmp_path)
    # The sweep is known by its last call only, which need not have made these runs.
    assert "command core-torl-train seed=7 last command of the sweep core-torl-train -cn smoke" in page.text


def test_old_runs_say_not_recorded_and_a_sum_of_some_runs_is_none(tmp_path: Path):
    top = sweep(tmp_path / "sweep")
    page = written(story_of(top, tmp_path / "f"), tmp_path)
    assert "command not recorded commit not recorded" in page.text and "sha256" not in page.text.split("Config")[-1]
    assert "Not recorded: wall time, training, RL steps, samples, attempts, hardware." in page.text
    add_results(top / "base_0", compute={"wall_s": 1.0})
    assert "Not recorded: wall time" in written(story_of(top, tmp_path / "f"), tmp_path).text


def test_config_differences_from_the_default_and_between_cells(story: Story, tmp_path: Path):
    page = written(story, tmp_path)
    same, other = page.source.split("Different between runs")
    assert re.search(r"rl_<wbr>steps</th><td[^>]*>10</td><td[^>]*>20</td>", same)
    assert "variant.<wbr>lr" in other and "variant.<wbr>lr" not in same.split('id="config"')[1]
    held = re.findall(r'class="code text( here)?">([\d.]+)</span> <span class="count">\s*([^<]*?)\s*</span>', other)
    assert sorted(held) == [("", "0.001", "base"), (" here", "0.002", "core/kl")]
    assert "paths." not in page.source.split('id="config"')[1]


# ---- samples -----------------------------------------------------------------------------------------------------


def test_samples_show_primed_answers_beside_plain_ones_and_mark_observations(tmp_path: Path):
    top = sweep(tmp_path / "sweep")
    assert "Samples" not in written(story_of(top, tmp_path / "f"), tmp_path).text
    rollouts(top / "core_1", "words")
    page = written(story_of(top, tmp_path / "f"), tmp_path)
    two = page.source[page.source.index("Triggered: without") :].split("</article>")[0]
    assert 'class="answers two"' in two and "plain words" in two and "primed words" in two
    assert "plain prompt: wrong, reward 0" in two and "primed prompt: not judged, reward none" in two
    assert re.findall(r'<pre class="observation"[^>]*>\s*(.*?)</pre>', page.source, re.DOTALL) == ["2"]
    assert f"seed 1, {top / 'core_1'}" in page.text


def test_only_marks_make_an_observation():
    text = f"```output\n4\n```\na\n```python\nx\n```\n```output\n>>> call 1 of 1: ok\n{OBSERVATION}\n```\n5\n{END}\n```\nb\n```output\n6\n```\nc"
    found = [(piece.kind, piece.text) for piece in marked_pieces(text)]
    assert found == [
        ("text", "```output\n4\n```"), ("text", "a"), ("code", "```python\nx\n```"), ("status", "call 1 of 1: ok"), ("observation", "```\n5"),
        ("text", "b"), ("text", "```output\n6\n```"), ("text", "c"),
    ]  # fmt: skip
    unmarked = [piece.kind for piece in pieces(f"```output\n6\n```\n{OBSERVATION}\n7\n{END}")]
    assert unmarked == ["output", "text"], "without marks that can be trusted nothing is an observation"
    assert [p.kind for p in marked_pieces(">>> call 1 of 2: infrastructure, nothing was shown\n")] == ["status"]


def test_transcripts_before_and_after():
    """Held against what a training writes."""
    from core_torl.evaluation.protocol import Item, SetResult
    from core_torl.problem import Problem
    from core_torl.runs.transcripts import transcripts_markdown

    def result(accuracy: float, transcript: str) -> list[SetResult]:
        item = Item("q/1", None, accuracy, None, accuracy, None, 0.0, 0.0, 1, 0.0, transcript)
        return [SetResult("gap", "greedy", [item], 1)]

    problem = Problem(uid="q/1", question="What is 1+1 ?", answer="2")
    old, new = result(0.0, "three"), result(1.0, "```python\nx\n```\n## Answer: 2")
    (sample,) = before_and_after(transcripts_markdown(old, new, {"gap": [problem]}))
    assert sample.problem == "gap/greedy: [q/1] What is 1+1 ?" and sample.facts == [("right answer", "2")]
    assert [one.heading for one in sample.answers] == ["before training: wrong", "after training: right"]
    assert [[piece.text for piece in one.pieces] for one in sample.answers] == [
        ["three"],
        ["```python\nx\n```", "## Answer: 2"],
    ]
    assert before_and_after("## something else\n") == []


def test_long_answers_are_cut_and_say_so():
    (piece,) = pieces("x" * 10_000)
    assert len(piece.text) < 6100 and "4,000 characters left out" in piece.text


# ---- foreign text ------------------------------------------------------------------------------------------------


def test_foreign_text_is_text(tmp_path: Path):
    page = written(hostile(tmp_path), tmp_path)
    tags = [tag for tag, _ in page.elements]
    assert tags.count("script") == 1, "only the page's own"
    assert not {"img", "link", "iframe", "object", "image", "foreignObject"} & set(tags)
    assert not [a for _, a in page.elements for name in a if name.startswith("on")]
    assert ATTACK not in page.source and page.text.count(ATTACK) > 8


def test_the_script_is_the_one_that_the_page_allows(story: Story, tmp_path: Path):
    source = written(story, tmp_path).source
    script = source.split("<script>")[1].split("</script>")[0]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = re.search(r'http-equiv="Content-Security-Policy" content="([^"]+)"', source)
    assert policy and "default-src 'none'" in policy[1] and f"script-src 'sha256-{digest}'" in policy[1]


def test_nothing_is_fetched(story: Story, tmp_path: Path):
    page = written(story, tmp_path)
    addresses = [a[name] or "" for _, a in page.elements for name in ("href", "src", "xlink:href") if name in a]
    assert addresses and all(address.startswith("#") for address in addresses)
    assert "@import" not in page.source and "http://" not in page.source and "https://" not in page.source
    assert all(target.startswith("#") for target in re.findall(r"url\(([^)]*)\)", page.source))


# ---- figures -----------------------------------------------------------------------------------------------------


def test_ids_of_figures_do_not_collide_and_references_find_them(story: Story, tmp_path: Path):
    page = written(story, tmp_path)
    ids = [one["id"] for one in page.having("id")]
    assert len(ids) == len(set(ids)), "one id twice"
    used = {(one["href"] or "")[1:] for one in page.having("href")} | set(re.findall(r"url\(#([^)]+)\)", page.source))
    assert used <= set(ids) and any(name.startswith("figure-2-") for name in used)
    for number, caption in enumerate(story.figures, start=1):
        assert f'<title id="figure-{number}-title">{caption}</title>' in page.source
    assert len([one for one in page.having("role") if one["role"] == "img"]) == 2


def test_an_svg_keeps_its_drawing_and_loses_the_rest(tmp_path: Path):
    (tmp_path / "a.svg").write_text(
        '<?xml version="1.0"?><!DOCTYPE svg><svg xmlns="http://www.w3.org/2000/svg" width="72pt" height="36pt"'
        ' xmlns:xlink="http://www.w3.org/1999/xlink" onload="alert(1)"><metadata>m</metadata><!-- c -->'
        '<style>* {}</style><script>alert(1)</script><defs><clipPath id="p"><path d="M0 0"/></clipPath></defs>'
        '<g clip-path="url(#p)"><use xlink:href="#p"/><use xlink:href="http://x/y#z"/><text>a &lt; b</text></g></svg>'
    )
    found = str(inline_svg(tmp_path / "a.svg", "f1", "T & <t>"))
    assert found == (
        '<svg viewBox="0 0 72 36" role="img" aria-labelledby="f1-title" style="--drawn: 96px">'
        '<title id="f1-title">T &amp; &lt;t&gt;</title><defs><clipPath id="f1-p"><path d="M0 0" /></clipPath></defs>'
        '<g clip-path="url(#f1-p)"><use href="#f1-p" /><use /><text>a &lt; b</text></g></svg>'
    )


def test_a_file_that_is_no_figure_is_named(tmp_path: Path):
    for text in ("no xml", "<html/>"):
        (tmp_path / "a.svg").write_text(text)
        with pytest.raises(UserError, match=re.escape(f"{tmp_path / 'a.svg'}: no SVG")):
            inline_svg(tmp_path / "a.svg", "f1", "t")


# ---- the package -------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_wheel_has_the_template(tmp_path: Path):
    uv = shutil.which("uv")
    if uv is None:
        pytest.skip("uv is not on PATH: no wheel can be built here")
    top = Path(__file__).parents[2]
    done = subprocess.run(
        [uv, "build", "--wheel", "--no-build-isolation", "--python", sys.executable, "-o", str(tmp_path), str(top)],
        capture_output=True, text=True,
    )  # fmt: skip
    if "hatchling" in done.stderr and done.returncode:
        pytest.skip(f"hatchling is not installed: {done.stderr.strip().splitlines()[-1]}")
    assert done.returncode == 0, done.stderr
    names = zipfile.ZipFile(next(tmp_path.glob("*.whl"))).namelist()
    assert {f"core_torl/reports/templates/{name}" for name in ("page.html.jinja", "page.css", "page.js")} <= set(names)


def test_a_run_of_more_than_one_code_is_warned_of(tmp_path: Path):
    top = sweep(tmp_path / "sweep")
    assert not written(story_of(top, tmp_path / "f"), tmp_path).having("data-mixed")
    add_results(top / "core_1", provenance={"commit": "new", "mixed_code": True})
    (top / "base_0" / "run.json").write_text(json.dumps({"app": "train", "provenance": {"mixed_code": True}}))
    page = written(story_of(top, tmp_path / "f"), tmp_path)
    assert "2 runs were made by more than one version of the code" in page.text
    assert len(page.having("data-mixed")) == 2 and f"core/kl, seed 1: {top / 'core_1'}" in page.text


def test_samples_that_cannot_be_read_are_named_and_the_page_goes_on(tmp_path: Path):
    top = sweep(tmp_path / "sweep")
    (top / "core_0" / "rollouts.jsonl").write_text("{\n{}\n")
    page = written(story_of(top, tmp_path / "f"), tmp_path)
    assert "Not shown, for the file is broken" in page.text and "rollouts.jsonl, line 1" in page.text
