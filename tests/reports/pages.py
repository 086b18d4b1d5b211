"""What the tests of the HTML report share: a small sweep as a story, the page as its elements, and its numbers."""

from __future__ import annotations

import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from core_torl.reports.comparing import compare
from core_torl.reports.finished import group
from core_torl.reports.page import write_page
from core_torl.reports.sources import find_runs
from core_torl.reports.story import Story
from core_torl.tracking.comparison_figures import CellPicture, comparison_figure
from core_torl.tracking.samples import END, OBSERVATION
from tests.reports.test_comparing import write

HEADLINE = "gap/greedy/robust_accuracy"
ATTACK = "<script>alert(1)</script>"


def sweep(top: Path, label: str = "core/kl", more: dict[str, Any] | None = None) -> Path:
    """Two cells of three seeds; the second is better by 0.3, 0.31 and 0.32, which is significant."""
    for seed in range(3):
        write(top / f"base_{seed}", "base", seed, [(0.3, 0.2, 2), (0.3, 0.2, 2)])
        high = 0.5 + 0.01 * seed
        write(top / f"core_{seed}", label, seed, [(0.7, high, 2), (0.7, high, 2)], variant={"lr": 2e-3}, **(more or {}))
    return top


def story_of(top: Path, where: Path, title: str = "A title", baseline: str | None = "base", **more: Any) -> Story:
    runs, unfinished = find_runs([top])
    groups = sorted(group(runs, ["experiment"]), key=lambda one: one.label != "base")
    comparison = compare(groups, HEADLINE, ["gap", "mastered"], "greedy", baseline, 0.95, 0)
    comparison |= {
        "title": title, "by": ["experiment"], "x": None,
        "unfinished": [{"folder": str(r.folder), "state": r.state, "why": r.why} for r in unfinished],
    }  # fmt: skip
    rows = [
        {"run": run.folder.name, "folder": str(run.folder), "state": run.state, "why": run.why}
        | {f"after/{label}": one["value"] for label, one in run.results.get("after", {}).items()}
        for run in [*runs, *unfinished]
    ]
    for name in ("one", "two"):  # the same labels and clip paths twice: their ids would collide
        pictures = [
            CellPicture(cell["label"], cell["before"][HEADLINE], cell["after"][HEADLINE], [0.1, 0.2])
            for cell in comparison["cells"]
        ]
        comparison_figure(pictures, where / f"{name}.png", title, "gap robust accuracy", baseline)
    given: dict[str, Any] = {
        "title": title, "template": "core", "comparison": comparison, "groups": groups, "histories": {}, "curves": [],
        "colours": {}, "runs": pa.Table.from_pylist(rows), "defaults": {"variant.lr": 1e-3, "rl_steps": 10},
        "figures": {f"{title}, first": where / "one.svg", f"{title}, second": where / "two.svg"},
    }  # fmt: skip
    return Story(**given | more)


class Page(HTMLParser):
    """The elements of a page with their attributes, and its text."""

    def __init__(self, path: Path):
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []  # what a person reads
        self.source = path.read_text(encoding="utf-8")
        self.feed(self.source)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag in ("td", "th", "dt", "dd", "p", "li", "div", "pre", "h1", "h2", "h3", "h4"):
            self.words.append(" ")

    def handle_data(self, data: str) -> None:
        if self.elements and self.elements[-1][0] not in ("script", "style"):
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join("".join(self.words).split())

    def having(self, *names: str) -> list[dict[str, str | None]]:
        return [attributes for _, attributes in self.elements if all(name in attributes for name in names)]


def written(story: Story, tmp_path: Path) -> Page:
    write_page(story, tmp_path / "page.html")
    return Page(tmp_path / "page.html")


def add_results(folder: Path, **sections: Any) -> None:
    path = folder / "results.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | sections))


def check_numbers(found: list[dict[str, Any]], story: Story) -> None:
    """Numbers of the page, as attributes, against the comparison and the aggregate."""
    of_cell = {(one["data-cell"], one["data-metric"]): float(one["data-value"]) for one in found if "data-cell" in one}
    cells = story.comparison["cells"]
    for cell in cells:
        for label, estimate in cell["after"].items():
            assert of_cell[cell["label"], f"after/{label}"] == estimate.value
        assert of_cell[cell["label"], "sampled_tokens"] == cell["sampled_tokens"]
        if cell["paired"]:
            assert of_cell[cell["label"], "difference"] == cell["paired"]["difference"].value
            assert of_cell[cell["label"], "p_holm"] == cell["paired"]["p_holm"]
    of_run = {(one["data-run"], one["data-metric"]): float(one["data-value"]) for one in found if "data-run" in one}
    done = [row for row in story.runs.to_pylist() if row["state"] == "completed"]
    for row in done:
        for label in (HEADLINE, "mastered/greedy/accuracy"):
            assert of_run[row["run"], f"after/{label}"] == row[f"after/{label}"]
    # What a cell says is the mean of what its runs say in the aggregate.
    for one, cell in zip(story.groups, cells, strict=True):
        own = [row[f"after/{HEADLINE}"] for row in done if row["folder"] in {str(r.folder) for r in one.runs.values()}]
        assert of_cell[cell["label"], f"after/{HEADLINE}"] == pytest.approx(sum(own) / len(own), abs=1e-12)


def rollouts(folder: Path, answer: str) -> None:
    """One row of each kind that looks different."""
    common = {"rl_step": 3, "problem": "[q/1] What ?", "concept": "trace"}
    told = f"```python\nprint(2)\n```\n```output\n>>> call 1 of 1: ok\n{OBSERVATION}\n2\n{END}\n```\nSo 2 {answer}"
    rows = [
        {"kind": "best", **common, "reward": 1.0, "outcome": "correct", "finish": "stop", "tokens": 9, "answer": answer},
        {"kind": "triggered", **common, "shown": "Definition : d .", "plain_answer": f"plain {answer}",
         "primed_answer": "primed words", "plain_reward": 0.0, "primed_reward": None, "plain_outcome": "wrong",
         "primed_outcome": "", "primed_right": "1 of 2"},
        {"kind": "tools", "rl_step": 3, "problem": "p", "reward": 1.0, "outcome": "correct", "calls": 1, "answer": told},
    ]  # fmt: skip
    (folder / "rollouts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def hostile(tmp_path: Path) -> Story:
    """A story with an attack in an answer, a transcript, a label, a config key and value, a caption and the title."""
    quote = '"><img src=x onerror=alert(2)>'
    top = sweep(tmp_path / "sweep", f"core/{ATTACK}{quote}", {"intervention": {ATTACK: quote + ATTACK}})
    rollouts(top / "core_0", f"{ATTACK} {quote} </pre></article>")
    (top / "core_0" / "transcripts.md").write_text(
        f"## gap: {ATTACK}\n\nAnswer: {ATTACK}\n\nBefore (wrong):\n\n````text\n{ATTACK}\n````\n"
        f"\nAfter (right):\n\n````text\n{ATTACK}{quote}\n````\n"
    )
    add_results(top / "core_0", provenance={"command": f"core-torl-train {ATTACK}", "commit": ATTACK})
    return story_of(top, tmp_path / "figures", title=f"{ATTACK}{quote}")
