"""A report of training runs: tables, the numbers behind them, pictures, all runs in one file, and a page.

A cell holds the runs that differ in nothing but their seed. ``sources`` finds the runs, ``automatic`` chooses what the
user did not, ``numbers`` compares, ``drawing`` draws, ``aggregate`` writes a row for each run, ``page`` and
``wandb_report`` tell it all from one ``Story``.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from rich.text import Text

from core_torl.config.checks import check_axes, check_report
from core_torl.config.errors import UserError, nearest
from core_torl.reports import aggregate, automatic
from core_torl.reports.drawing import apart, cell_colours, draw, lines_over, picture
from core_torl.reports.finished import Group, Run, absent_run, check_sets, dotted, group
from core_torl.reports.histories import first_and_last, metric_lines, present
from core_torl.reports.numbers import MASTERED, compare, plain
from core_torl.reports.sources import find_runs
from core_torl.reports.story import Story
from core_torl.tracking.comparison_latex import latex
from core_torl.tracking.comparison_table import absent, legend, markdown, rich_tables
from core_torl.tracking.console import make_console

# Every file that a report may write.
WRITTEN = (
    aggregate.RUNS, aggregate.CURVES, "table.md", "table.tex", "comparison.json", "curves.csv", "report.html",
    "wandb_report.json",
    *(f"{picture}.{kind}" for picture in ("comparison", "line", "curves", "retained") for kind in ("png", "svg")),
)  # fmt: skip


def report(cfg: DictConfig) -> None:
    """Write everything that was asked for into ``cfg.output`` and print the table.

    Always: ``table.md``, ``table.tex``, ``comparison.json``, ``runs.parquet``, ``curves.parquet`` and the picture
    ``comparison``, as PNG and SVG. ``x`` asks for the picture ``line``, ``curves`` for ``curves`` and ``curves.csv``,
    ``final`` for a second table, ``html`` for ``report.html``, ``wandb_report`` for a report in W&B. The files of an
    earlier report are removed, so that none of them stands beside those of this one. UserError, and nothing written,
    for what the runs do not have; where no run is finished the two files of all runs are written.
    """
    sources, notes = _sources(cfg), []
    runs, unfinished = find_runs(sources, notes)
    every = [*runs, *unfinished]
    _check_kind(cfg, every)
    plan = _plan(cfg, runs, unfinished) if runs else None
    with aggregate.gathered(every, sources, _metrics(cfg), notes) as logged:
        if plan is None:
            if unfinished:
                _write_runs(logged, Path(cfg.output))
            raise _none_finished(cfg, unfinished)
        _tell(cfg, plan, runs, unfinished, logged, notes)


def report_of(folder: Path, output: Path) -> None:
    """The report of all runs below ``folder``, everything chosen from them: what a sweep ends with.

    The two files of all runs are written whatever comes after. UserError where no run is finished, or where the runs
    cannot be compared.
    """
    notes: list[str] = []
    runs, unfinished = find_runs([folder], notes)
    every = [*runs, *unfinished]
    if not every:
        raise UserError(f"runs={folder}: no training run in it")
    cfg = _composed("report", [f"template={automatic.pick_template(runs, unfinished)}"])
    cfg.runs, cfg.output, cfg.paths.output_dir = str(folder), str(output), str(output)
    cfg.by = None  # a template names what its sweeps mostly vary; here it is known what this one does
    check_report(cfg)
    with aggregate.gathered(every, [str(folder)], _metrics(cfg), notes) as logged:
        _write_runs(logged, output)
        if not runs:
            raise _none_finished(cfg, unfinished)
        _tell(cfg, _plan(cfg, runs, unfinished), runs, unfinished, logged, notes)


@dataclass(frozen=True)
class Plan:
    """What is compared with what. ``cells`` has those without a finished run too, ``groups`` only the others."""

    chosen: Chosen
    cells: Sequence[Group]
    groups: Sequence[Group]
    baseline: str | None
    pairs: Mapping[str, str]


def _plan(cfg: DictConfig, runs: Sequence[Run], unfinished: Sequence[Run]) -> Plan:
    """UserError for what the runs do not have, and for runs that are no cells."""
    chosen = choose(cfg, runs)
    cells = group(runs, chosen.by, unfinished)
    groups = [one for one in cells if one.runs]
    baseline, pairs = _baseline(chosen, groups)
    cells.sort(key=lambda one: one.label != baseline)
    groups.sort(key=lambda one: one.label != baseline)
    return Plan(chosen, cells, groups, baseline, pairs)


def _tell(
    cfg: DictConfig, plan: Plan, runs: Sequence[Run], unfinished: Sequence[Run], logged: aggregate.Gathered,
    found: Sequence[str],
) -> None:  # fmt: skip
    """Compare, and write and print everything. ``found`` are the notes so far."""
    sources, output = _sources(cfg), Path(cfg.output)
    chosen, groups, baseline, histories = plan.chosen, plan.groups, plan.baseline, logged.histories
    comparison = compare(
        plan.cells, chosen.headline, chosen.sets, chosen.decoding, baseline or plan.pairs, cfg.confidence, cfg.seed
    ) | {
        "title": cfg.title or _title(sources), "by": chosen.by, "x": cfg.x,
        "unfinished": [absent_run(run, plan.cells) for run in unfinished],
    }  # fmt: skip
    notes = comparison["notes"]
    if chosen.baseline == automatic.AUTO and len(groups) > 1 and not plan.pairs:
        notes.append(automatic.no_baseline(groups))
    notes += [*found, *(f"{run.name}: {run.why}." for run in runs if run.why)]
    kept = f"{MASTERED}/{chosen.decoding}/accuracy"
    pictures = [
        picture(one, cell, chosen.headline, kept, histories)
        for one, cell in zip(groups, comparison["cells"], strict=True)
    ]
    lines = {} if cfg.x is None else lines_over(cfg.x, cfg.line, groups, comparison)
    metrics = present("curves", list(cfg.curves), histories)
    curves = metric_lines(groups, metrics, histories, cfg.curves_window, cfg.confidence, notes, cfg.curves_axis)
    colours = cell_colours(curves, pictures, baseline, notes)
    notes += apart(pictures, baseline)
    if curves:
        comparison["curves"] = {
            "metrics": metrics, "axis": cfg.curves_axis, "window": cfg.curves_window, "drawn": list(colours)
        }  # fmt: skip
    if cfg.final:
        comparison["final"] = first_and_last(
            groups, present("final", list(cfg.final), histories), histories, cfg.final_steps, cfg.confidence, notes
        )
    _write_runs(logged, output)
    figures = draw(cfg, comparison, pictures, lines, curves, colours, output)
    (output / "table.md").write_text(markdown(comparison))
    (output / "table.tex").write_text(latex(comparison))
    (output / "comparison.json").write_text(json.dumps(plain(comparison), indent=1) + "\n")
    story = Story(
        comparison["title"], cfg.kind, comparison, groups, histories, curves, colours, logged.table, figures,
        default_config() if cfg.html or cfg.wandb_report != "none" else {},
    )  # fmt: skip
    written = ["table.md", "table.tex", "comparison.json", *(f"{file.stem}.png" for file in figures.values())]
    written += ["curves.csv"] if "curves" in comparison else []
    written += [aggregate.RUNS, aggregate.CURVES]
    if cfg.html:
        from core_torl.reports.page import write_page

        write_page(story, output / "report.html")
        written.append("report.html")
    _print(comparison, f"Wrote {', '.join(written)} in {output}")
    if cfg.wandb_report != "none":
        from core_torl.reports.wandb_report import publish

        where = publish(story, mode=cfg.wandb_report, entity=cfg.wandb_entity, project=cfg.wandb_project, output=output)
        make_console().print(Text(f"W&B report: {where or output / 'wandb_report.json'}"))


# ---- what to compare ---------------------------------------------------------------------------------------------


class Chosen:
    """What the report is about: the user's words, and where there are none, what suits the runs."""

    def __init__(self, cfg: DictConfig, runs: Sequence[Run]) -> None:
        self.by: list[str] = list(cfg.by) if cfg.by is not None else automatic.choose_by(runs)
        self.decoding: str = cfg.decoding or automatic.choose_decoding(runs)
        self.sets: list[str] = (
            automatic.choose_sets(runs, self.decoding) if cfg.sets is None
            else automatic.find_sets(runs, self.decoding, list(cfg.sets))
        )  # fmt: skip
        self.headline: str = automatic.choose_headline(runs, self.sets, self.decoding, cfg.headline)
        self.baseline: str | None = cfg.baseline


def choose(cfg: DictConfig, runs: Sequence[Run]) -> Chosen:
    """Everything that has to be known before runs are grouped. UserError for what they do not have."""
    chosen = Chosen(cfg, runs)
    check_axes(chosen.by, cfg.x, cfg.line)
    check_sets(runs, chosen.sets, chosen.decoding, chosen.headline)
    return chosen


def _baseline(chosen: Chosen, groups: Sequence[Group]) -> tuple[str | None, dict[str, str]]:
    """The one baseline, and the baseline of each other cell; UserError for a label that no cell has."""
    labels = [one.label for one in groups]
    if chosen.baseline == automatic.AUTO:
        pairs = automatic.choose_baselines(groups, chosen.headline)
        bases = set(pairs.values())
        return (bases.pop() if len(bases) == 1 else None), pairs
    if chosen.baseline is not None and chosen.baseline not in labels:
        hint = nearest(chosen.baseline, labels)
        raise UserError(f"baseline={chosen.baseline}: no such cell.{hint} Cells: {', '.join(sorted(labels))}")
    return chosen.baseline, {}


def _check_kind(cfg: DictConfig, every: Sequence[Run]) -> None:
    if cfg.kind == "run" and len(every) > 1:
        raise UserError(
            f"template=run is about one run, and runs={cfg.runs} holds {len(every)}: name one of them, or use "
            "template=sweep"
        )


def _none_finished(cfg: DictConfig, unfinished: Sequence[Run]) -> UserError:
    also = ""
    if unfinished:
        states = ", ".join(sorted(f"{run.name} is {run.state}" for run in unfinished)[:3])
        also = f"; {len(unfinished)} unfinished ({states}), written to {Path(cfg.output) / aggregate.RUNS}"
    return UserError(f"runs={cfg.runs}: no finished training run (a results.json of core-torl-train) in it{also}")


def _metrics(cfg: DictConfig) -> list[str]:
    """The metrics whose values over training are shown."""
    return [name.removesuffix("?") for name in (*cfg.curves, *cfg.final)]


def _write_runs(logged: aggregate.Gathered, output: Path) -> None:
    """Write the two files of all runs, and remove what an earlier report has left in ``output``."""
    for name in WRITTEN:
        (output / name).unlink(missing_ok=True)
    logged.write(output)


def _sources(cfg: DictConfig) -> list[str]:
    return [cfg.runs] if isinstance(cfg.runs, str) else list(cfg.runs)


def _title(sources: Sequence[str]) -> str:
    return ", ".join(Path(s).resolve().name if Path(s).is_dir() else s for s in sources)


# ---- small things ------------------------------------------------------------------------------------------------


def default_config() -> dict[str, Any]:
    """Flat config of ``core-torl-train`` without overrides: dotted keys and values, lists as values."""
    cfg = _composed("train", [])
    cfg.paths.output_dir = "its own folder"
    return dotted(OmegaConf.to_container(cfg, resolve=True))


def _composed(name: str, overrides: list[str]) -> DictConfig:
    """One of the shipped configs; a Hydra app that is running is left as it was."""
    from hydra import compose, initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra
    from hydra.core.singleton import Singleton

    from core_torl.config.paths import conf_dir
    from core_torl.config.schema import register

    register()
    before = Singleton.get_state()
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(conf_dir(), version_base=None):
            return compose(name, overrides)
    finally:
        Singleton.set_state(before)


def _print(comparison: Mapping[str, Any], written: str) -> None:
    console = make_console()
    for table in rich_tables(comparison):
        console.print(table)
    for line in [*legend(comparison), *(f"Note: {note}" for note in comparison["notes"])]:
        console.print(Text(line))
    for line in absent(comparison):
        console.print(Text(f"Not in the table: {line}", style="red"))
    console.print(Text(written))
