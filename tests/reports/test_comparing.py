"""Reports over run folders that the tests write: numbers by hand, mistakes in one line, nothing left out in silence."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from core_torl.reports.comparing import WRITTEN
from core_torl.reports.drawing import picture
from core_torl.reports.finished import group
from core_torl.reports.numbers import compare
from core_torl.reports.sources import find_runs

from ..config.conftest import run_batch

MEASURES = ("accuracy", "robust_accuracy")


def rows(shares: dict[str, list[tuple[float, float, int]]]) -> list[dict[str, Any]]:
    return [
        {"set": name, "decoding": "greedy", "concept": f"{name}{i}", "n": n, "accuracy": a, "robust_accuracy": r}
        for name, concepts in shares.items()
        for i, (a, r, n) in enumerate(concepts)
    ]


def estimates(table: list[dict[str, Any]]) -> dict[str, Any]:
    found = {}
    for name in {row["set"] for row in table}:
        own = [row for row in table if row["set"] == name]
        for measure in MEASURES:
            value = sum(row[measure] * row["n"] for row in own) / sum(row["n"] for row in own)
            found[f"{name}/greedy/{measure}"] = {"value": value, "low": 0.0, "high": 1.0, "n": 4, "method": "Wilson"}
    return found


def write(
    folder: Path, experiment: str | None, seed: int, gap: list[tuple[float, float, int]], mastered: float = 0.9,
    steps: int = 20, before_rows: bool = True, **config: Any,
) -> Path:  # fmt: skip
    """A run folder as a finished training leaves it; before training gap is 0.1 / 0.05 and mastered 1."""
    after = rows({"gap": gap, "mastered": [(mastered, mastered, 8)], "gap_primed": [(0.75, 0.5, 8)]})
    before = rows({"gap": [(0.1, 0.05, n) for _, _, n in gap], "mastered": [(1.0, 1.0, 8)]})
    folder.mkdir(parents=True)
    (folder / ".hydra").mkdir()
    (folder / ".hydra" / "config.yaml").write_text(f"rl_steps: {steps}\n")
    tree = {"seed": seed, "rl_steps": steps, "variant": {"lr": 1e-3}, "paths": {"output_dir": str(folder)}} | config
    results = {
        "before": estimates(before), "after": estimates(after), "per_concept": after,
        "last": {"train/rl_step": steps, "train/sampled_tokens": 1000.0 * steps + 500 * seed},
        "run": {"choices": {"experiment": experiment, "variant": "grpo"}, "config": tree, "seed": seed,
                "rl_steps": steps},
    }  # fmt: skip
    if before_rows:
        results["per_concept_before"] = before
    (folder / "results.json").write_text(json.dumps(results))
    lines = [
        {"train/rl_step": k, "train/sampled_tokens": 1000 * k, "reward/accuracy": k / (2 * steps)}
        for k in range(1, steps + 1)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


@pytest.fixture
def sweep(tmp_path: Path) -> Path:
    """Two cells of two seeds. Robust: base 0.2 and 0.3; core 0.4 (0.5 * 2 + 0.3 * 2) / 4 and 0.6."""
    top = tmp_path / "sweep"
    write(top / "0", "base", 0, [(0.3, 0.2, 2), (0.3, 0.2, 2)])
    write(top / "1", "base", 1, [(0.4, 0.1, 1), (0.4, 0.5, 1)])
    write(top / "2", "core/kl", 0, [(0.6, 0.5, 2), (0.4, 0.3, 2)], mastered=0.8)
    write(top / "3", "core/kl", 1, [(0.8, 0.6, 1), (0.8, 0.6, 1)], mastered=1.0)
    return top


def test_numbers_are_those_by_hand(sweep: Path, report):
    code, out, err, where = report(f"runs={sweep}", "baseline=base", "title=A title", "curves=[]")
    assert (code, err) == (0, "")
    lines = (where / "table.md").read_text().splitlines()
    assert lines[0] == "# A title"
    start, base, core = ([cell.strip() for cell in line.strip("|").split("|")] for line in lines[4:7])
    # label, seeds, steps, thousands of tokens, then gap and mastered with their intervals
    assert start[:4] == ["before training", "", "0", "0"]
    assert [cell.split(" [")[0] for cell in start[4:8]] == ["10.0", "5.0", "100.0", "100.0"]
    assert base[:4] == ["base", "2", "20", "20.2"] and core[:4] == ["core/kl", "2", "20", "20.2"]
    assert [cell.split(" [")[0] for cell in base[4:8]] == ["35.0", "25.0", "90.0", "90.0"]
    assert [cell.split(" [")[0] for cell in core[4:8]] == ["65.0", "50.0", "90.0", "90.0"]
    assert base[8:] == ["90.0", "(baseline)", "", ""]
    assert core[9].startswith("+25.0 [-") and core[10:] == ["0.126", "0.126"]  # differences 0.2 and 0.3: t = 5, 1 df
    found = json.loads((where / "comparison.json").read_text())
    assert [c["label"] for c in found["cells"]] == ["base", "core/kl"]
    one = found["cells"][1]
    assert [r["headline"] for r in one["runs"]] == pytest.approx([0.4, 0.6])
    assert [r["sampled_tokens"] for r in one["runs"]] == [20000, 20500]
    assert one["paired"]["difference"]["value"] == pytest.approx(0.25) and one["paired"]["seeds"] == [0, 1]
    assert one["after"]["gap/greedy/robust_accuracy"]["method"] == "percentile bootstrap over 2 seeds and 2 concepts"
    assert found["notes"] == [] and found["unfinished"] == []
    assert "core/kl" in out and "50.0 [" in out and "+25.0 [" in out
    assert sorted(p.name for p in where.iterdir()) == [
        "comparison.json",
        "comparison.png",
        "comparison.svg",
        "curves.parquet",
        "report.html",
        "runs.parquet",
        "table.md",
        "table.tex",
    ]


def test_without_a_baseline_nothing_is_compared(sweep: Path, report):
    _, _, _, where = report(f"runs={sweep}")
    text = (where / "table.md").read_text()
    assert "difference" not in text and "| p |" not in text and "# sweep" in text


def add_distractors(folder: Path, retained: dict[int, list[tuple[float | None, float]]]) -> None:
    """K -> (share, problems solved without distractors) of each concept, as an evaluation writes them."""
    results = json.loads((folder / "results.json").read_text())
    for k, concepts in retained.items():
        results["per_concept"] += [
            {"set": f"gap_distractors{k}", "decoding": "greedy", "concept": f"c{i}", "n": 8, "accuracy": 0.1,
             "robust_accuracy": 0.1, "n_robust": 8, "retained": share, "n_retained": solved}
            for i, (share, solved) in enumerate(concepts)
        ]  # fmt: skip
        whole = sum(solved for _, solved in concepts)
        value = sum(share * solved for share, solved in concepts if share is not None) / whole
        results["after"][f"gap_distractors{k}/greedy/retained"] = {
            "value": value, "low": 0.0, "high": 1.0, "n": whole, "method": "bootstrap"
        }  # fmt: skip
    (folder / "results.json").write_text(json.dumps(results))


def test_what_is_retained_with_distractors(sweep: Path, report):
    """RUD_K: concepts weigh what was solved of them without distractors; one of which nothing was counts for nothing."""
    for number in range(4):
        high = 0.5 if number < 2 else 0.8
        # 4 solved of which 2 (base), 1 of which all, none: (0.5 * 4 + 1) / 5 = 0.6 and 0.84
        add_distractors(sweep / str(number), {1: [(high, 4), (1.0, 1), (None, 0)], 2: [(high / 2, 0.5)]})
    code, _, err, where = report(f"runs={sweep}", "template=core", "by=[experiment]")
    assert (code, err) == (0, "")
    found = json.loads((where / "comparison.json").read_text())
    assert found["sets"] == ["gap", "mastered", "gap_primed", "gap_distractors1", "gap_distractors2"]
    one = "gap_distractors1/greedy/retained"
    assert [c["after"][one]["value"] for c in found["cells"]] == pytest.approx([0.6, 0.84])
    text = (where / "table.md").read_text()
    head = text.splitlines()[2]
    assert "gap primed accuracy (%) | gap retained with 1 irrelevant concept (%) | gap retained with 2 irr" in head
    assert "of the problems solved without them" in text and "gap accuracy with" not in text
    assert not any("another value in results.json" in note for note in found["notes"])
    drawn = (where / "retained.svg").read_text()
    assert "K, irrelevant concepts before the question" in drawn and "core/kl" in drawn
    page = (where / "report.html").read_text()
    assert 'data-metric="after/gap_distractors1/greedy/retained"' in page and "still solved with irrelevant" in page
    assert report(f"runs={sweep}", f"headline={one}", "baseline=base")[0] == 0
    pair = json.loads((where / "comparison.json").read_text())["cells"][1]["paired"]
    assert pair["difference"]["value"] == pytest.approx(0.24)


def test_cells_with_missing_runs_say_so(sweep: Path, report):
    """Killed and failed runs are counted where they belong; a cell of which nothing is left keeps its row."""
    for name, experiment, seed, error in (("8", "core/kl", 2, None), ("9", "core/cr", 4, "boom")):
        folder = write(sweep / name, experiment, seed, [(0.3, 0.2, 2)])
        (folder / "results.json").unlink()
        tree = {"seed": seed, "rl_steps": 20, "variant": {"lr": 1e-3}}
        (folder / ".hydra" / "config.yaml").write_text(json.dumps(tree))
        choices = {"experiment": experiment, "variant": "grpo"}
        (folder / ".hydra" / "hydra.yaml").write_text(json.dumps({"hydra": {"runtime": {"choices": choices}}}))
        record = {"app": "train", "state": "failed" if error else "killed", "error": error, "choices": choices}
        (folder / "run.json").write_text(json.dumps(record))
    code, out, err, where = report(f"runs={sweep}", "by=[experiment]", "template=core")
    assert (code, err) == (0, "")
    text, tex = (where / "table.md").read_text(), (where / "table.tex").read_text()
    assert "| core/kl | 2 of 3 (1 killed) | 20 |" in text and "| core/cr | 0 of 1 (1 failed) | – | – |" in text
    absent = f"{sweep / '9'} (cell core/cr, seed 4): failed, boom"
    assert absent in text and f"% Not in the table: {absent}" in tex and "".join(absent.split()) in "".join(out.split())
    assert "core/cr & 0 of 1 (1 failed) & --" in tex and "0 of 1 (1 failed)" in (
        page := (where / "report.html").read_text()
    )
    assert "boom, cell core/cr, seed 4" in page
    assert json.loads((where / "comparison.json").read_text())["empty"] == [
        {"label": "core/cr", "seeds": "0 of 1 (1 failed)"}
    ]


def test_other_seeds_in_another_cell_are_noted_without_a_baseline(sweep: Path, report):
    write(sweep / "9", "base", 2, [(0.3, 0.2, 2)])
    _, _, _, where = report(f"runs={sweep}", "curves=[]")
    notes = json.loads((where / "comparison.json").read_text())["notes"]
    assert "Not all cells have the same seeds: base has 0, 1, 2; core/kl has 0, 1." in notes


def test_each_cell_has_the_baseline_of_its_kind(tmp_path: Path, report):
    """Two policies, base and core on each: differences are to base on the same policy, and the table says to which."""
    for number, (experiment, path, robust) in enumerate(
        [("core/base", "a", 0.1), ("core/kl", "a", 0.3), ("core/base", "b", 0.5), ("core/kl", "b", 0.9)]
    ):
        write(tmp_path / "s" / str(number), experiment, 0, [(0.9, robust, 2), (0.9, robust, 2)], model={"path": path})
    code, _, err, where = report(f"runs={tmp_path / 's'}", "by=[experiment,model.path]", "template=core")
    assert (code, err) == (0, "")
    found = json.loads((where / "comparison.json").read_text())
    pairs = {c["label"]: (c["baseline"], c["paired"]["difference"]["value"]) for c in found["cells"] if c["paired"]}
    assert pairs == {
        "core/kl path:a": ("core/base path:a", pytest.approx(0.2)),
        "core/kl path:b": ("core/base path:b", pytest.approx(0.4)),
    }
    text = (where / "table.md").read_text()
    assert text.count("(baseline)") == 2 and "core/kl path:b to core/base path:b" in text
    page = " ".join((where / "report.html").read_text().split())
    assert "of 2 cells" in page or "No cell differs from <b>the baseline of its kind</b>" in page


def test_without_a_baseline_to_choose_a_note_says_so(tmp_path: Path, report):
    for number, lr in enumerate((1e-3, 2e-3)):
        write(tmp_path / "s" / str(number), "demo", 0, [(0.3, 0.2, 2)], variant={"lr": lr})
    _, out, _, where = report(f"runs={tmp_path / 's'}", "template=core")
    (note,) = [n for n in json.loads((where / "comparison.json").read_text())["notes"] if "No baseline" in n]
    assert note.endswith("set baseline=LABEL. Cells: lr:0.001, lr:0.002.") and "No baseline was chosen" in out


def test_texts_are_no_markup(tmp_path: Path, report):
    """What Markdown and matplotlib would read as their own; a title with dollars ended the report."""
    write(tmp_path / "s" / "a", "a_*b*_<i>x</i>|y", 0, [(0.3, 0.2, 2)], steps=20)
    write(tmp_path / "s" / "b", "a_*b*_<i>x</i>|y", 1, [(0.3, 0.2, 2)], steps=21, rl_steps=9)
    write(tmp_path / "s" / "c", "a_*b*_<i>x</i>|y", 2, [(0.3, 0.2, 2)], steps=21, rl_steps=9)
    results = json.loads((tmp_path / "s" / "a" / "results.json").read_text())
    results["run"]["config"]["rl_steps"] = 9
    del results["last"]["train/sampled_tokens"]
    (tmp_path / "s" / "a" / "results.json").write_text(json.dumps(results))
    code, _, err, where = report(f"runs={tmp_path / 's'}", "title='for $5 \\oops$, _so_'")
    assert (code, err) == (0, "")
    text = (where / "table.md").read_text()
    assert r"| a\_\*b\*\_\<i>x\</i>\|y | 3 | 20.7 | 21.8 |" in text, "20.667 RL steps, (21.5 + 22) / 2 thousand tokens"
    assert text.startswith("# for $5") and r"\_so\_" in text
    assert "tokens are those of 2 of its 3 runs only" in text


def test_steps_repeated_after_a_restart_are_drawn_once(sweep: Path):
    runs, _ = find_runs([sweep])
    one = next(g for g in group(runs, ["experiment"]) if g.label == "base")
    again = [{"train/rl_step": 2, "train/sampled_tokens": 2000, "reward/accuracy": 0.9}]
    histories = {run.folder: [*run.rows(), *again] for run in runs}
    label = "gap/greedy/robust_accuracy"
    cells = compare([one], label, ["gap"], "greedy", None, 0.95, 0)["cells"]
    drawn = picture(one, cells[0], label, "mastered/greedy/accuracy", histories).curves
    assert [len(curve) for curve in drawn] == [20, 20] and (2000.0, 0.9) in drawn[0]


def test_unfinished_runs_are_named_and_not_averaged(sweep: Path, report):
    (sweep / "4" / ".hydra").mkdir(parents=True)
    (sweep / "5" / ".hydra").mkdir(parents=True)
    (sweep / "5" / ".hydra" / "config.yaml").write_text("rl_steps: 20\ndry_run: true\n")
    (sweep / "6" / ".hydra").mkdir(parents=True)
    (sweep / "6" / ".hydra" / "config.yaml").write_text("checkpoint: null\n")  # an evaluation
    (sweep / "7").mkdir()
    (sweep / "7" / "results.json").write_text(json.dumps({"estimates": {}}))
    (sweep / "8").mkdir()
    (sweep / "8" / "results.json").write_text(json.dumps({"before": {}, "after": {}}))
    _, out, _, where = report(f"runs=[{sweep},{sweep / '1'}]")
    left = json.loads((where / "comparison.json").read_text())["unfinished"]
    assert [Path(run["folder"]).name for run in left] == ["4", "8"]
    assert "no results.json" in left[0]["why"] and "no section 'run'" in left[1]["why"]
    assert f"{sweep / '4'}: unfinished" in (where / "table.md").read_text()
    assert f"Not in the table: {sweep / '4'}" in out.replace("\n", "")


def test_the_same_folder_given_twice_counts_once(sweep: Path):
    assert len(find_runs([sweep, sweep / "1"])[0]) == 4


def test_one_seed_draws_concepts_only_and_has_no_p(tmp_path: Path, report):
    write(tmp_path / "s" / "a", "base", 0, [(0.3, 0.2, 2), (0.3, 0.4, 2)])
    write(tmp_path / "s" / "b", "other", 0, [(0.3, 0.3, 2), (0.3, 0.8, 2)])
    _, _, _, where = report(f"runs={tmp_path / 's'}", "baseline=base")
    found = json.loads((where / "comparison.json").read_text())
    after = found["cells"][1]["after"]
    assert after["gap/greedy/robust_accuracy"]["method"] == "percentile bootstrap over 2 concepts, one seed"
    assert after["mastered/greedy/accuracy"]["low"] is None, "one seed and one concept have no interval"
    assert found["cells"][1]["paired"]["p"] is None
    assert found["notes"] == ["other against base: no p-value, one common seed."]
    assert "| – | – |" in (where / "table.md").read_text()


def test_by_keys_x_and_line(tmp_path: Path, report):
    for number, (lr, rl_steps) in enumerate([(0.1, 4), (0.1, 16), (0.01, 4), (0.01, 16)]):
        model = {"path": f"/models/eps-{lr}/policy"}
        gap = [(0.5, 0.01 * rl_steps, 2), (0.5, 10 * lr * 0.5, 2)]
        write(tmp_path / "s" / str(number), None, 0, gap, steps=rl_steps, variant={"lr": lr}, model=model)
    code, _, err, where = report(
        f"runs={tmp_path / 's'}", "by=[model.path,rl_steps]", "x=config/rl_steps", "line=model.path",
        "baseline=path:eps-0.1 rl_steps:4",
    )  # fmt: skip
    assert (code, err) == (0, "")
    found = json.loads((where / "comparison.json").read_text())
    labels = ["eps-0.1 rl_steps:4", "eps-0.01 rl_steps:4", "eps-0.01 rl_steps:16", "eps-0.1 rl_steps:16"]
    assert [c["label"] for c in found["cells"]] == [f"path:{label}" for label in labels]
    assert [c["x"] for c in found["cells"]] == [4, 4, 16, 16]
    drawn = (where / "line.svg").read_text()
    assert "path:eps-0.1 " in drawn and "path:eps-0.01 " in drawn and "config/rl_steps" in drawn
    assert (where / "line.png").stat().st_size > 5000


def test_an_experiment_that_was_not_chosen_has_a_label(tmp_path: Path, report):
    write(tmp_path / "s" / "a", "None", 0, [(0.3, 0.2, 2)])  # write_results makes text of every choice
    _, _, _, where = report(f"runs={tmp_path / 's'}", "by=[experiment]")
    assert "| experiment:none | 1 |" in (where / "table.md").read_text()


def test_a_budget_of_tokens_may_end_seeds_at_other_steps(tmp_path: Path, report):
    write(tmp_path / "s" / "a", "base", 0, [(0.3, 0.2, 2)], steps=20, token_budget=20000, rl_steps=99)
    write(tmp_path / "s" / "b", "base", 1, [(0.3, 0.2, 2)], steps=22, token_budget=20000, rl_steps=99)
    _, _, _, where = report(f"runs={tmp_path / 's'}")
    assert json.loads((where / "comparison.json").read_text())["notes"] == []
    assert "| base | 2 | 21 |" in (where / "table.md").read_text()


def test_primed_sets_show_their_accuracy_where_asked_for(sweep: Path, report):
    _, _, _, where = report(f"runs={sweep}", "sets=[gap,gap_primed]")
    head = (where / "table.md").read_text().splitlines()[2]
    assert "gap primed accuracy (%)" in head and "primed robust" not in head and "mastered" not in head


def test_without_rows_before_training_the_estimates_serve(tmp_path: Path, report):
    write(tmp_path / "s" / "a", "base", 0, [(0.3, 0.2, 2)], before_rows=False)
    _, _, _, where = report(f"runs={tmp_path / 's'}")
    assert "| before training |  | 0 | 0 | 10.0 | 5.0 |" in (where / "table.md").read_text()


def test_cells_that_start_differently_have_a_column_for_it(tmp_path: Path, report):
    top = tmp_path / "s"
    write(top / "a", "base", 0, [(0.3, 0.2, 2)])
    results = json.loads((write(top / "b", "other", 0, [(0.3, 0.2, 2)]) / "results.json").read_text())
    for row in results["per_concept_before"]:
        row["robust_accuracy"] *= 0.5
    (top / "b" / "results.json").write_text(json.dumps(results))
    _, _, _, where = report(f"runs={top}")
    text = (where / "table.md").read_text()
    assert "before training" not in text and "| gap robust accuracy before (%) |" in text
    assert "| base | 1 | 20 | 20.0 | 5.0 |" in text and "| other | 1 | 20 | 20.0 | 2.5 |" in text


def test_what_a_reader_would_not_expect_is_noted(tmp_path: Path, report):
    top = tmp_path / "s"
    write(top / "a", "base", 0, [(0.3, 0.2, 2), (0.3, 0.2, 2)])
    write(top / "b", "base", 1, [(0.3, 0.2, 2), (0.3, 0.2, 2)])
    write(top / "c", "other", 1, [(0.3, 0.2, 2)])
    write(top / "d", "other", 5, [(0.3, 0.2, 2)])
    (top / "d" / "metrics.jsonl").unlink()
    results = json.loads((top / "a" / "results.json").read_text())
    results["after"]["gap/greedy/robust_accuracy"]["value"] = 0.4
    (top / "a" / "results.json").write_text(json.dumps(results))
    _, out, _, where = report(f"runs={top}", "baseline=base")
    notes = " ".join(json.loads((where / "comparison.json").read_text())["notes"])
    assert "paired over 1 common seeds and 1 common concepts; 2 seeds and 1 concepts have no partner" in notes
    assert "1 runs have another value in results.json" in notes
    assert f"{top / 'd'} has no metrics.jsonl" in notes
    assert "Note: other against base: paired over" in out and "## Notes" in (where / "table.md").read_text()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["by=[experimnt]"], "has no such config group or key. Did you mean 'experiment'?"),
        (["by=[variant.rl]"], "Did you mean 'variant.lr'?"),
        (["baseline=core/k"], "baseline=core/k: no such cell. Did you mean 'core/kl'? Cells: base, core/kl"),
        (["headline=gap/sampled/accuracy"], "has no such rows. There are: gap/greedy, gap_primed/greedy,"),
        (["sets=[gaps]"], "sets: no run has gaps/greedy. There are: gap/greedy"),
        (["x=before/gap/greedy/acuracy"], "Did you mean 'before/gap/greedy/accuracy'?"),
        (["x=config/paths.output_dir"], "which is no number"),
        (["x=gap"], "x=gap: must start with before/"),
        (["by=[experiment,variant]", "x=config/seed"], "needs line"),
        (["line=variant"], "line=variant: must be one of by=['experiment']"),
        (["headline=gap/robust_accuracy"], "headline=gap/robust_accuracy: write set/decoding/measure"),
        (["confidence=95"], "confidence=95.0: a share between 0 and 1"),
        (["by=[]"], "by=[]: name at least one"),
        (["sets=[]"], "sets=[]: name at least one"),
        (["decoding=beam"], "decoding='beam': use greedy or sampled"),
        (["runs=nowhere"], "runs=nowhere: no such folder"),
        (["runs=[]"], "runs=[]: a folder"),
        (["baselin=x"], "unknown key 'baselin'. Did you mean 'baseline'?"),
    ],
    ids=lambda x: x[0] if isinstance(x, list) else "",
)
def test_mistakes_read_as_one_line(sweep: Path, report, arguments, says):
    code, out, err, where = report(f"runs={sweep}", *arguments)
    assert (code, out) == (2, "")
    assert says in err and err.startswith("core-torl: ") and err.count("\n") == 1
    assert not where.exists()


def test_runs_must_be_given_and_hold_a_training(report, tmp_path: Path):
    assert "runs has no value: set runs=..." in report()[2]
    (tmp_path / "empty" / "0" / ".hydra").mkdir(parents=True)
    assert "no finished training run" in (err := report(f"runs={tmp_path / 'empty'}")[2]) and "1 unfinished" in err


def test_a_seed_twice_in_a_cell_is_refused_with_what_differs(sweep: Path, report):
    write(sweep / "9", "base", 1, [(0.3, 0.2, 2)], variant={"lr": 2e-3})
    err = report(f"runs={sweep}", "by=[experiment]")[2]
    assert f"cell base has seed 1 twice: {sweep / '1'} and {sweep / '9'}; they differ in variant.lr" in err
    assert report(f"runs={sweep}", "by=[experiment,variant.lr]")[0] == 0


def test_runs_of_different_recipes_are_not_one_cell(sweep: Path, report):
    """Seeds are all that runs of a cell may differ in; other seeds under another learning rate are another cell."""
    write(sweep / "9", "base", 7, [(0.3, 0.2, 2)], variant={"lr": 2e-3})
    err = report(f"runs={sweep}", "by=[experiment]")[2]
    assert f"cell base has runs of different recipes: {sweep / '0'} and {sweep / '9'} differ in variant.lr" in err
    assert report(f"runs={sweep}", "by=[experiment,variant.lr]")[0] == 0


def test_cells_without_a_common_seed_are_refused(tmp_path: Path, report):
    write(tmp_path / "s" / "a", "base", 0, [(0.3, 0.2, 2)])
    write(tmp_path / "s" / "b", "other", 1, [(0.3, 0.2, 2)])
    assert "other against base: no seed with common concepts" in report(f"runs={tmp_path / 's'}", "baseline=base")[2]


def test_a_broken_file_costs_its_own_run_only(sweep: Path, report):
    """Torn results, rows that are no JSON, an empty run.json: the others are compared, and the report names all."""
    write(sweep / "4", "core/kl", 2, [(0.8, 0.6, 2)])
    (sweep / "4" / "results.json").write_text("")
    (sweep / "4" / "metrics.jsonl").write_text("no\n{}\n")
    lines = (sweep / "3" / "metrics.jsonl").read_text().splitlines()
    (sweep / "3" / "metrics.jsonl").write_text("\n".join([lines[0], "{", *lines[1:], ""]))
    (sweep / "2" / "run.json").write_text("")
    code, _, err, where = report(f"runs={sweep}", "baseline=base", "curves=[reward/accuracy]")
    assert code == 0, err
    found = json.loads((where / "comparison.json").read_text())
    assert [len(cell["seeds"]) for cell in found["cells"]] == [2, 2]
    (left,) = found["unfinished"]
    assert (left["state"], left["why"]) == ("unfinished", "results.json is no JSON")
    broken = "{}: broken, its learning curve is missing (metrics.jsonl, line {}: no JSON"
    starts = [broken.format(sweep / "3", 2), broken.format(sweep / "4", 1), f"{sweep / '2'}: run.json is no JSON."]
    assert all(any(note.startswith(start) for note in found["notes"]) for start in starts), found["notes"]


def test_files_of_an_earlier_report_do_not_stay(sweep: Path, report):
    full = ("x=config/rl_steps", "curves=[reward/accuracy]", "wandb_report=json")
    pytest.importorskip("wandb_workspaces")
    _, _, err, where = report(f"runs={sweep}", *full)
    assert err == ""
    optional = {"line.png", "line.svg", "curves.png", "curves.svg", "curves.csv", "report.html", "wandb_report.json"}
    first = {path.name for path in where.iterdir()}
    assert optional < first <= set(WRITTEN), "the list of what may be written is whole"
    (where / "mine.txt").write_text("")
    report(f"runs={sweep}", "html=false", "curves=[]")
    assert {path.name for path in where.iterdir()} == first - optional | {"mine.txt"}
    # A report that cannot be made leaves the earlier one, unless it writes what runs there are.
    assert report(f"runs={sweep}", "headline=gap/greedy/nothing")[0] == 2 and (where / "table.md").exists()
    for path in sweep.glob("*/results.json"):
        path.write_text("")
    assert report(f"runs={sweep}")[0] == 2
    assert {path.name for path in where.iterdir()} == {"runs.parquet", "curves.parquet", "mine.txt"}


def test_it_starts_and_runs_without_torch(sweep: Path, tmp_path: Path):
    done = run_batch([("report", [f"runs={sweep}", "baseline=base"])], tmp_path)
    assert done["results"][0]["code"] == 0, done["results"][0]["err"]
    assert done["heavy"] == []
    assert list(tmp_path.glob("outputs/report/*/table.md"))
