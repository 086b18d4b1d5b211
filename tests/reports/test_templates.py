"""Templates and the whole command: what each is about, what comes first, what is written, and the report of a sweep."""

from __future__ import annotations

import json
import socket
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from pyarrow import parquet

from core_torl.config.errors import UserError
from core_torl.config.paths import conf_dir
from core_torl.config.schema import register
from core_torl.reports.comparing import default_config, report_of
from core_torl.tracking.mirror import read_jsonl

from .test_comparing import write

GAP = [(0.3, 0.2, 2), (0.3, 0.4, 2)]


def edit(folder: Path, sampled: bool = False, choices: dict[str, Any] | None = None, **config: Any) -> None:
    """Change a written run: decoding, options, keys."""
    results = json.loads((folder / "results.json").read_text())
    if sampled:
        for section in ("per_concept", "per_concept_before"):
            results[section] = [row | {"decoding": "sampled", "robust_accuracy": None} for row in results[section]]
        for section in ("before", "after"):
            results[section] = {k.replace("greedy", "sampled"): v for k, v in results[section].items()}
    results["run"]["choices"] |= choices or {}
    results["run"]["config"] |= config
    (folder / "results.json").write_text(json.dumps(results))


@pytest.fixture
def core(tmp_path: Path) -> Path:
    top = tmp_path / "core_sweep"
    for number, (variant, seed) in enumerate([("core_base", 0), ("core_base", 1), ("core_kl", 0), ("core_kl", 1)]):
        folder = write(top / str(number), "demo", seed, GAP, steps=4)
        edit(folder, choices={"variant": variant}, variant={"lr": 1e-3, "_target_": variant})
        if variant == "core_kl":
            rows = [row | {"core/trigger_rate": 0.5} for row in read_jsonl(folder / "metrics.jsonl")]
            (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return top


@pytest.fixture
def torl(tmp_path: Path) -> Path:
    top = tmp_path / "torl_sweep"
    for number, (budget, penalty) in enumerate([(0, 0.0), (1, 0.0), (2, 0.0), (2, -0.5)]):
        folder = write(top / str(number), "torl/world", 0, GAP, steps=4)
        edit(folder, True, variant={"tool_call_budget": budget}, tool={"call_budget": budget}, reward={"p": penalty})
    return top


def told(where: Path) -> dict[str, Any]:
    return json.loads((where / "comparison.json").read_text())


def test_everything_is_chosen_where_nothing_is_said(core: Path, report):
    code, _, err, where = report(f"runs={core}")
    assert (code, err) == (0, "")
    found = told(where)
    assert found["by"] == ["variant"] and found["sets"] == ["gap", "mastered"] and found["decoding"] == "greedy"
    assert found["baseline"] == "core_base" and found["headline"] == "gap/greedy/robust_accuracy"
    assert found["curves"]["metrics"] == ["reward/accuracy"]


def test_the_core_template(core: Path, report):
    _, _, _, where = report(f"runs={core}", "template=core")
    found = told(where)
    assert found["curves"]["metrics"] == ["reward/accuracy", "core/trigger_rate"], "no run has primed answers"
    assert found["baseline"] == "core_base" and [c["label"] for c in found["cells"]] == ["core_base", "core_kl"]


def test_the_torl_template_and_the_users_own_keys_before_it(torl: Path, report):
    """The template's cells are budgets; here a penalty differs as well, so the user says more."""
    assert "they differ in reward.p" in report(f"runs={torl}", "template=torl")[2]
    by = "by=[variant.tool_call_budget,reward.p]"
    code, _, err, where = report(f"runs={torl}", "template=torl", by, "baseline=null", "curves=[]")
    assert (code, err) == (0, "")
    found = told(where)
    assert found["decoding"] == "sampled" and found["headline"] == "gap/sampled/accuracy"
    assert found["baseline"] is None and "curves" not in found and not (where / "curves.csv").exists()
    assert len(found["cells"]) == 4


def test_the_run_template_is_about_one_run(core: Path, report):
    code, out, err, where = report(f"runs={core}", "template=run")
    assert (code, out) == (2, "") and not where.exists()
    assert err == f"core-torl: template=run is about one run, and runs={core} holds 4: name one of them, or use " + (
        "template=sweep\n"
    )
    code, _, err, where = report(f"runs={core / '2'}", "template=run")
    assert (code, err) == (0, "")
    assert told(where)["curves"]["metrics"] == ["reward/accuracy", "core/trigger_rate"]
    assert [c["label"] for c in told(where)["cells"]] == ["demo"]


def test_pictures_are_png_and_svg_and_the_table_is_latex_too(core: Path, report):
    _, out, _, where = report(f"runs={core}", "x=last/train/rl_step")
    for name in ("comparison", "line", "curves"):
        assert (where / f"{name}.png").stat().st_size > 5000
        assert (where / f"{name}.svg").read_text().rstrip().endswith("</svg>")
    tex = (where / "table.tex").read_text()
    assert r"core\_base & 2 & 4" in tex and r"\toprule" in tex and r"\end{tabular}" in tex
    words = out.replace("\n", " ")
    assert "table.tex" in words and "runs.parquet" in words and "report.html" in words


def test_the_page_is_left_out_where_it_is_not_wanted(core: Path, report):
    _, out, _, where = report(f"runs={core}", "html=false")
    assert not (where / "report.html").exists() and "report.html" not in out


def test_curves_over_tokens(core: Path, report):
    _, _, _, where = report(f"runs={core}", "curves_axis=sampled_tokens", "curves_window=1")
    lines = (where / "curves.csv").read_text().splitlines()
    assert lines[0] == "metric,cell,seed,sampled_tokens,mean,low,high,seeds"
    assert lines[1].startswith("reward/accuracy,core_base,0,1000,0.125")
    assert "sampled tokens" in (where / "curves.svg").read_text()


def test_the_story_goes_to_wandb_where_asked(core: Path, report, monkeypatch: pytest.MonkeyPatch):
    seen: dict[str, Any] = {}
    module = pytest.importorskip("core_torl.reports.wandb_report")
    monkeypatch.setattr(module, "publish", lambda story, **said: seen.update(said, story=story))
    code, _, err, where = report(f"runs={core}", "template=core", "wandb_report=json", "wandb_entity=me")
    assert (code, err) == (0, "")
    story = seen.pop("story")
    assert seen == {"mode": "json", "entity": "me", "project": "core-torl", "output": where}
    assert story.template == "core" and story.title == "core_sweep"
    assert [one.label for one in story.groups] == [c["label"] for c in story.comparison["cells"]]
    assert [path.name for path in story.figures.values()] == ["comparison.svg", "curves.svg"]
    assert story.runs.num_rows == 4 and len(story.histories) == 4 and story.colours.keys() == {"core_base", "core_kl"}
    assert story.defaults["variant.lr"] > 0 and story.defaults["rl_steps"] > 0


def test_nothing_finished_still_leaves_the_table_of_all_runs(tmp_path: Path, report):
    folder = tmp_path / "s" / "0"
    (folder / ".hydra").mkdir(parents=True)
    record = {"app": "train", "state": "failed", "error": "no memory", "attempts": [{"host": socket.gethostname()}]}
    (folder / "run.json").write_text(json.dumps(record))
    code, out, err, where = report(f"runs={tmp_path / 's'}")
    assert (code, out) == (2, "") and err.count("\n") == 1
    assert f"1 unfinished ({folder} is failed), written to {where / 'runs.parquet'}" in err
    assert [p.name for p in sorted(where.iterdir())] == ["curves.parquet", "runs.parquet"]
    (row,) = parquet.read_table(where / "runs.parquet").to_pylist()
    assert (row["state"], row["why"]) == ("failed", "no memory")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["template=cor"], "template=cor: no such option. Did you mean 'core'?"),
        (["curves_axis=tokens"], "curves_axis=tokens: use rl_step, samples, sampled_tokens. Did you mean"),
        (["wandb_report=yes"], "wandb_report"),
        (["wandb_report=publsh"], "wandb_report=publsh: use none, json, draft, publish. Did you mean 'publish'?"),
        (["kind=all"], "kind=all: use sweep, core, torl, run"),
        (["curves=[reward/acuracy]"], "the nearest that there is: 'reward/accuracy'"),
        (["x=config/rl_steps", "by=[variant,seed]"], "x=config/rl_steps needs line"),
        (["decoding=sampled"], "decoding=sampled: no run has a test set of it"),
        (["runs=wandb://project"], "write wandb://entity/project"),
    ],
    ids=lambda x: x[0] if isinstance(x, list) else "",
)
def test_mistakes_read_as_one_line(core: Path, report, arguments: list[str], says: str):
    code, out, err, where = report(*([] if "runs" in arguments[0] else [f"runs={core}"]), *arguments)
    assert (code, out) == (2, "") and not where.exists()
    assert says in err and err.startswith("core-torl: ") and err.count("\n") == 1


# ---- what a sweep ends with --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "by"), [("core", ["variant"]), ("torl", ["reward.p", "variant.tool_call_budget"])])
def test_the_report_of_a_sweep(name: str, by: list[str], request: pytest.FixtureRequest, tmp_path: Path, capsys):
    top = request.getfixturevalue(name)
    (top / "9" / ".hydra").mkdir(parents=True)
    report_of(top, tmp_path / "out")
    found = told(tmp_path / "out")
    assert sorted(found["by"]) == by and found["title"] == f"{name}_sweep"
    assert [Path(run["folder"]).name for run in found["unfinished"]] == ["9"]
    assert (tmp_path / "out" / "report.html").exists() and "Not in the table" in capsys.readouterr().out


def test_the_report_of_torl_runs_is_about_the_harder_set(torl: Path, tmp_path: Path):
    for folder in sorted(torl.iterdir()):
        text = (folder / "results.json").read_text()
        (folder / "results.json").write_text(text.replace("gap", "one_stage").replace("mastered", "two_stage"))
    report_of(torl, tmp_path / "out")
    assert told(tmp_path / "out")["headline"] == "two_stage/sampled/accuracy"


def test_a_terminal_has_room_for_all_test_sets(core: Path, report):
    """With many sets the labels of the cells would be pushed out."""
    code, out, _, _ = report(f"runs={core}", "sets=[gap,mastered,gap_primed]", "curves=[]")
    assert code == 0 and "after training (more)" in out
    assert sum(line.split()[1:2] == ["core_kl"] for line in out.splitlines()) == 3


def test_it_leaves_a_running_hydra_as_it_was(core: Path, tmp_path: Path):
    register()
    with initialize_config_dir(conf_dir(), version_base=None):
        before = compose("train")
        report_of(core, tmp_path / "out")
        assert GlobalHydra.instance().is_initialized() and compose("train") == before


def test_the_report_of_a_sweep_keeps_all_runs_where_they_cannot_be_compared(tmp_path: Path):
    write(tmp_path / "s" / "a", "base", 0, GAP)
    report_of(tmp_path / "s", tmp_path / "out")
    write(tmp_path / "s" / "b", "base", 0, GAP)
    with pytest.raises(UserError, match="cell base has seed 0 twice"):
        report_of(tmp_path / "s", tmp_path / "out")
    assert parquet.read_table(tmp_path / "out" / "runs.parquet").num_rows == 2
    left = {path.name for path in (tmp_path / "out").iterdir()}
    assert left == {"runs.parquet", "curves.parquet"}, "nothing of the report before"
    with pytest.raises(UserError, match="no training run in it"):
        report_of(tmp_path / "out", tmp_path / "none")


def test_the_defaults_are_those_of_the_command():
    found = default_config()
    register()
    with initialize_config_dir(conf_dir(), version_base=None):
        cfg = compose("train", ["paths.output_dir=x"])
    assert found["variant.lr"] == cfg.variant.lr and found["group_size"] == cfg.group_size
    assert found["sampler.max_new_tokens"] == cfg.model.max_new_tokens, "resolved"
