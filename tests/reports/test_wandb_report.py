"""The report for W&B, as the model that W&B would store: its texts are those of the table, its panels show the runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import pyarrow as pa
import pytest

from core_torl.config.errors import UserError
from core_torl.reports.finished import Run, group
from core_torl.reports.histories import read_each
from core_torl.reports.numbers import compare
from core_torl.reports.story import Story
from core_torl.reports.wandb_report import ROLLOUTS, group_keys, publish, run_filter
from core_torl.tracking.comparison_table import markdown
from core_torl.tracking.rollouts import COLUMNS

from .test_comparing import write

interface = pytest.importorskip(
    "wandb_workspaces.reports.v2.interface",
    reason="wandb-workspaces is not installed: pip install 'core-torl[reports]'",
)

HEADLINE = "gap/greedy/robust_accuracy"
CURVES = ["reward/accuracy", "time/step_s"]


@pytest.fixture
def story(tmp_path: Path) -> Story:
    return make_story(tmp_path)


def make_story(
    folder: Path, by: tuple[str, ...] = ("experiment", "variant.lr"), template: str = "core", **more: Any
) -> Story:
    """Two cells of two seeds, one unfinished run; each run has its W&B id, its group and its command."""
    runs = []
    for number, (experiment, seed) in enumerate((e, s) for e in ("base", "core/kl") for s in (0, 1)):
        place = folder / "sweep" / str(number)
        logger = {"logger": {"group": "sweep|one", "artifacts": ["results"]}}
        write(place, experiment, seed, [(0.3, 0.2 + number / 10, 2), (0.3, 0.2, 2)], **logger)
        results = json.loads((place / "results.json").read_text())
        results["provenance"] = {"command": "core-torl-train -m seed=0,1", "commit": "abc123", "dirty": False}
        results["compute"] = {
            "wall_s": 90.0 + number,
            "train_s": 60.0,
            "sampled_tokens": 1000,
            "samples": 10,
            "attempts": 1,
        }
        runs.append(Run(place, results, record={"wandb_id": f"id{number}"}))
    groups = group(runs, list(by))
    notes: list[str] = []
    comparison = compare(groups, HEADLINE, ["gap"], "greedy", groups[0].label, 0.95, 0) | {
        "title": "A | story", "by": list(by), "x": None, "curves": {"metrics": CURVES, "window": 5, "drawn": []},
        "unfinished": [{"folder": str(folder / "sweep" / "4"), "why": "exit code 1 | out of memory", "state": "failed"}],
    }  # fmt: skip
    return Story(**{
        "title": "A | story", "template": template, "comparison": comparison, "groups": groups,
        "histories": read_each(runs, [], notes), "curves": [], "colours": {}, "runs": pa.table({}), "figures": {},
        "defaults": {"variant.lr": 1e-4, "rl_steps": 20},
    } | more)  # fmt: skip


def written(story: Story, folder: Path, **more: Any) -> dict[str, Any]:
    where = folder / "report"
    assert publish(story, output=where, **({"mode": "json", "entity": None, "project": "core"} | more)) is None
    return json.loads((where / "wandb_report.json").read_text())


def markdown_blocks(model: dict[str, Any]) -> list[str]:
    return [block["content"] for block in model["spec"]["blocks"] if block["type"] == "markdown-block"]


def grids(model: dict[str, Any]) -> list[dict[str, Any]]:
    return [block["metadata"] for block in model["spec"]["blocks"] if block["type"] == "panel-grid"]


def panels(model: dict[str, Any], kind: str) -> list[dict[str, Any]]:
    found = (panel for grid in grids(model) for panel in grid["panelBankSectionConfig"]["panels"])
    return [panel for panel in found if panel["viewType"] == kind]


def headings(model: dict[str, Any]) -> list[str]:
    return [block["children"][0]["text"] for block in model["spec"]["blocks"] if block["type"] == "heading"]


def test_the_table_is_that_of_table_md(story: Story, tmp_path: Path):
    model = written(story, tmp_path)
    table = markdown(story.comparison).splitlines()
    results = next(text for text in markdown_blocks(model) if "core/kl" in text and "difference" in text)
    assert table[2:] == results.splitlines(), "all of it but the title, which is the report's own"
    assert any(line.startswith("| core/kl lr:0.001 | 2 | 20 |") for line in results.splitlines())
    assert model["displayName"] == "A | story" and model["project"]["name"] == "core"


def test_the_same_story_in_the_same_order(story: Story, tmp_path: Path):
    model = written(story, tmp_path)
    assert headings(model) == [
        "What was run", "Config, where it is not the default", "Results", "Curves and runs", "What the policies wrote",
        "Compute", "Runs and their files",
    ]  # fmt: skip
    code = next(block for block in model["spec"]["blocks"] if block["type"] == "code-block")
    assert code["children"][0]["children"][0]["text"] == "core-torl-train -m seed=0,1"
    text = "\n".join(markdown_blocks(model))
    assert "| commit | abc123, clean | 4 of 4 |" in text
    assert "| variant.lr | 0.0001 | 0.001 | all |" in text and "| rl_steps | 20" not in text
    assert "| base lr:0.001 | 2 | 3 min 01 s | 2 min 00 s |" in text
    assert model["description"].startswith("4 runs in 2 cells")


def test_runs_that_are_not_in_the_table_come_first(story: Story, tmp_path: Path):
    blocks = written(story, tmp_path)["spec"]["blocks"][1:3]
    assert blocks[0]["children"][0]["children"][0]["text"] == "Not in the table: 1 of 5 runs."
    assert (
        blocks[1]["content"].splitlines()[2]
        == f"| {tmp_path / 'sweep' / '4'} | failed | exit code 1 \\| out of memory |"
    )
    whole = make_story(tmp_path / "whole")
    whole.comparison["unfinished"].clear()
    assert written(whole, tmp_path / "whole")["spec"]["blocks"][1]["type"] == "heading"


def test_panels_are_drawn_over_steps_and_over_tokens(story: Story, tmp_path: Path):
    model = written(story, tmp_path)
    lines = panels(model, "Run History Line Plot")
    assert [(panel["config"]["metrics"], panel["config"]["xAxis"]) for panel in lines] == [
        ([name], axis) for name in CURVES for axis in ("train/rl_step", "train/sampled_tokens")
    ]
    assert lines[2]["config"]["yAxisTitle"] == "time/step_s (s)"
    assert {panel["config"]["groupAgg"] for panel in lines} == {"mean"}
    (bars,) = panels(model, "Bar Chart")
    assert bars["config"]["metrics"] == [f"eval/{HEADLINE}"], "the name under which runs log it"
    assert len(panels(model, "Run Comparer")) == 1
    places = [tuple(panel["layout"].values()) for panel in grids(model)[0]["panelBankSectionConfig"]["panels"]]
    assert len(set(places)) == len(places)


def test_without_curves_of_its_own_a_story_shows_the_accuracy(tmp_path: Path):
    story = make_story(tmp_path)
    story.comparison.pop("curves")  # pyright: ignore[reportAttributeAccessIssue]
    lines = panels(written(story, tmp_path), "Run History Line Plot")
    assert {name for panel in lines for name in panel["config"]["metrics"]} == {"reward/accuracy"}


def test_panels_show_the_runs_of_the_table_and_their_cells(story: Story, tmp_path: Path):
    for grid in grids(written(story, tmp_path)):
        (runset,) = grid["runSets"]
        (one,) = runset["filters"]["filters"]
        assert one["key"] == {"section": "run", "name": "name"}, "W&B's word for the id of a run"
        assert (one["op"], one["value"]) == ("IN", ["id0", "id1", "id2", "id3"])
        # A dotted key of a flat config, not lr inside of variant (which would be variant.value.lr).
        assert [(key["section"], key["name"]) for key in runset["grouping"]] == [
            ("config", "choices.experiment.value"), ("config", "variant.lr.value"),
        ]  # fmt: skip


def test_runs_without_ids_are_found_by_group_and_else_not_at_all(story: Story, tmp_path: Path):
    for one in story.groups:
        one.runs.update({seed: Run(run.folder, run.results) for seed, run in one.runs.items()})
    (own,) = grids(written(story, tmp_path))[0]["runSets"][0]["filters"]["filters"]
    assert (own["key"]["name"], own["op"], own["value"]) == ("group", "IN", ["sweep|one"])
    story.groups[0].runs[0].results["run"]["config"]["logger"]["group"] = None
    model = written(story, tmp_path)
    assert grids(model)[0]["runSets"][0]["filters"]["filters"] == []
    assert "others among them" in json.dumps(model)
    assert run_filter(story)[0] == ""


@pytest.mark.parametrize(
    ("template", "kinds"), [("core", ROLLOUTS["core"]), ("torl", ROLLOUTS["torl"]), ("sweep", None)]
)
def test_tables_of_answers_are_those_that_runs_log(tmp_path: Path, template: str, kinds):
    media = panels(written(make_story(tmp_path, template=template), tmp_path), "Media Browser")
    keys = [key for panel in media for key in panel["config"]["mediaKeys"]]
    assert {key.partition("/")[2] for key in keys} <= COLUMNS.keys()
    assert keys == [f"rollouts/{kind}" for kind in kinds or ("triggered", "tools", "newly_solved")]


def test_runs_and_artifacts_are_linked(story: Story, tmp_path: Path, monkeypatch):
    monkeypatch.delenv("WANDB_BASE_URL", raising=False)
    links = markdown_blocks(written(story, tmp_path, entity="me"))[-1].splitlines()
    assert links[2].endswith(
        "| [id0](https://wandb.ai/me/core/runs/id0) "
        "| [results-id0](https://wandb.ai/me/core/artifacts/results/results-id0) |"
    )
    assert "](" not in markdown_blocks(written(story, tmp_path))[-1], "no address without an entity"
    monkeypatch.setenv("WANDB_BASE_URL", "https://wandb.example.org/")
    assert "(https://wandb.example.org/me/core/runs/id3)" in markdown_blocks(written(story, tmp_path, entity="me"))[-1]


def test_flat_configs_of_runs_that_come_from_w_and_b(story: Story):
    run = story.groups[0].runs[0]
    run.results["run"]["config"].pop("logger")
    run.results["run"]["config"]["logger.group"] = "flat"
    for one in story.groups:
        one.runs.update({seed: Run(r.folder, r.results) for seed, r in one.runs.items()})
    assert run_filter(story)[0] == "Metric('Group') in ['flat', 'sweep|one']"
    assert group_keys(story) == ["choices.experiment.value", "variant.lr.value"]


# ---- saving ------------------------------------------------------------------------------------------------------


@pytest.fixture
def server(monkeypatch):
    """W&B as far as a report asks it: it knows the project me/core and keeps what is saved."""
    saved: list[tuple[bool, dict[str, Any]]] = []

    def ask(api: Any, query: Any, variables: dict[str, Any]) -> dict[str, Any]:
        known = (variables["entityName"], variables["projectName"]) == ("me", "core")
        return {"project": {"internalId": "UHJvamVjdEludGVybmFsSWQ6MQ=="} if known else None}

    def save(report: Any, draft: bool = False, clone: bool = False) -> Any:
        saved.append((draft, json.loads(report._to_model().model_dump_json(by_alias=True, exclude_none=True))))
        report.id = "abc"
        return report

    api = MagicMock(default_entity="me")
    monkeypatch.setattr("wandb.Api", lambda: api)
    monkeypatch.setattr(interface, "_get_api", lambda: api)
    monkeypatch.setattr(interface, "execute_graphql", ask)
    monkeypatch.setattr(interface, "get_app_url", lambda api: "https://wandb.ai")
    monkeypatch.setattr(interface.Report, "save", save)
    return saved


@pytest.mark.parametrize(("mode", "draft"), [("draft", True), ("publish", False)])
def test_saving_gives_the_address(story: Story, tmp_path: Path, server, mode: str, draft: bool):
    url = publish(story, mode=mode, entity=None, project="core", output=tmp_path / "none")
    assert url == "https://wandb.ai/me/core/reports/A-|-story--abc" and not (tmp_path / "none").exists()
    ((was_draft, model),) = server
    assert was_draft is draft
    for grid in grids(model):
        assert grid["runSets"][0]["project"] | {"id": ""} == {"id": "", "name": "core", "entityName": "me"}


def test_what_keeps_a_report_from_being_saved_is_one_line(story: Story, tmp_path: Path, server, monkeypatch):
    def message(**more: Any) -> str:
        with pytest.raises(UserError) as error:
            publish(story, **({"mode": "draft", "entity": "me", "project": "core", "output": tmp_path} | more))
        assert "\n" not in str(error.value)
        return str(error.value)

    assert message(mode="html") == "W&B report 'html': use json, draft, publish"
    assert message(project="other") == (
        "W&B has no project me/other, or none that you may read: send its runs first (wandb sync)"
    )
    errors = pytest.importorskip("wandb.errors")
    monkeypatch.setattr(interface.Report, "save", raising(errors.CommError("no route to host\nmore")))
    assert message() == "W&B does not take the report (no route to host)"
    monkeypatch.setattr("wandb.Api", raising(errors.UsageError("api_key not configured")))
    assert message(entity=None) == "a W&B report needs a login: run `wandb login`, or set WANDB_API_KEY"
    # What wandb-workspaces makes of the same.
    monkeypatch.setattr(
        interface.Report, "save", raising(Exception("not logged in to W&B, try `wandb login --relogin`"))
    )
    assert message() == "a W&B report needs a login: run `wandb login`, or set WANDB_API_KEY"
    assert server == []


def test_a_bug_of_ours_is_not_called_a_failure_of_w_and_b(story: Story, tmp_path: Path, server, monkeypatch):
    monkeypatch.setattr(interface.Report, "save", raising(ValueError("something else")))
    with pytest.raises(ValueError, match=r"^something else$"):
        publish(story, mode="draft", entity="me", project="core", output=tmp_path)


def test_without_wandb_workspaces_the_line_says_what_to_install(story: Story, tmp_path: Path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "wandb_workspaces.reports.v2", None)
    with pytest.raises(UserError, match=r"pip install 'core-torl\[reports\]'"):
        publish(story, mode="json", entity=None, project="core", output=tmp_path)


def raising(error: BaseException):
    def fail(*arguments: Any, **more: Any) -> Any:
        raise error

    return fail
