"""A report of training runs: tables, the numbers behind them, pictures, all runs in one file, and a page.

A cell holds the runs that differ in nothing but their seed. ``sources`` finds the runs, ``automatic`` chooses what the
user did not, ``numbers`` compares, ``drawing`` draws, ``aggregate`` writes a row for each run, ``page`` and
``wandb_report`` tell it all from one ``Story``.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from rich.text import Text

from core_torl.config.checks import check_axes, check_report
from core_torl.config.errors import UserError, nearest
from core_torl.reports import aggregate, automatic
from core_torl.reports.drawing import cell_colours, draw, lines_over, picture
from core_torl.reports.finished import Run, check_sets, dotted, group
from core_torl.reports.histories import first_and_last, metric_lines, present, read_histories, read_rows
from core_torl.reports.numbers import MASTERED, compare, plain
from core_torl.reports.sources import find_runs
from core_torl.reports.story import Story
from core_torl.tracking.comparison_latex import latex
from core_torl.tracking.comparison_table import absent, legend, markdown, rich_tables
from core_torl.tracking.console import make_console


def report(cfg: DictConfig) -> None:
    """Write everything that was asked for into ``cfg.output`` and print the table.

    Always: ``table.md``, ``table.tex``, ``comparison.json``, ``runs.parquet``, ``curves.parquet`` and the picture
    ``comparison``, as PNG and SVG. ``x`` asks for the picture ``line``, ``curves`` for ``curves`` and ``curves.csv``,
    ``final`` for a second table, ``html`` for ``report.html``, ``wandb_report`` for a report in W&B. UserError, and
    nothing written, for what the runs do not have; where no run is finished the two files of all runs are written.
    """
    sources = _sources(cfg)
    runs, unfinished = find_runs(sources)
    output = Path(cfg.output)
    _check_found(cfg, runs, unfinished, sources, output)
    chosen = choose(cfg, runs)
    groups = group(runs, chosen.by)
    baseline = chosen.baseline
    if baseline == automatic.AUTO:
        baseline = automatic.choose_baseline(groups, chosen.headline)
    labels = {g.label for g in groups}
    if baseline is not None and baseline not in labels:
        hint = nearest(baseline, labels)
        raise UserError(f"baseline={baseline}: no such cell.{hint} Cells: {', '.join(sorted(labels))}")
    groups.sort(key=lambda g: (g.label != baseline, _natural(g.label)))
    comparison = compare(
        groups, chosen.headline, chosen.sets, chosen.decoding, baseline, cfg.confidence, cfg.seed
    ) | {
        "title": cfg.title or _title(sources), "by": chosen.by, "x": cfg.x,
        "unfinished": [{"folder": run.name, "state": run.state, "why": run.why} for run in unfinished],
    }  # fmt: skip
    notes = comparison["notes"]
    histories = read_histories(groups, notes)
    kept = f"{MASTERED}/{chosen.decoding}/accuracy"
    pictures = [
        picture(one, cell, chosen.headline, kept, histories)
        for one, cell in zip(groups, comparison["cells"], strict=True)
    ]
    lines = {} if cfg.x is None else lines_over(cfg.x, cfg.line, groups, comparison)
    metrics = present("curves", list(cfg.curves), histories)
    curves = metric_lines(groups, metrics, histories, cfg.curves_window, cfg.confidence, notes, cfg.curves_axis)
    colours = cell_colours(curves, pictures, baseline, notes)
    if curves:
        comparison["curves"] = {
            "metrics": metrics, "axis": cfg.curves_axis, "window": cfg.curves_window, "drawn": list(colours)
        }  # fmt: skip
    if cfg.final:
        comparison["final"] = first_and_last(
            groups, present("final", list(cfg.final), histories), histories, cfg.final_steps, cfg.confidence, notes
        )
    every = {**histories, **read_rows(unfinished)}
    table = aggregate.write([*runs, *unfinished], every, sources, output)
    figures = draw(cfg, comparison, pictures, lines, curves, colours, output)
    (output / "table.md").write_text(markdown(comparison))
    (output / "table.tex").write_text(latex(comparison))
    (output / "comparison.json").write_text(json.dumps(plain(comparison), indent=1) + "\n")
    story = Story(
        comparison["title"], cfg.kind, comparison, groups, histories, curves, colours, table, figures,
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


def report_of(folder: Path, output: Path) -> None:
    """The report of all runs below ``folder``, everything chosen from them: what a sweep ends with.

    The two files of all runs are written whatever comes after. UserError where no run is finished, or where the runs
    cannot be compared.
    """
    runs, unfinished = find_runs([folder])
    if not runs and not unfinished:
        raise UserError(f"runs={folder}: no training run in it")
    every = [*runs, *unfinished]
    aggregate.write(every, read_rows(every), [str(folder)], output)
    cfg = _composed("report", [f"template={automatic.pick_template(runs, unfinished)}"])
    cfg.runs, cfg.output, cfg.paths.output_dir = str(folder), str(output), str(output)
    cfg.by = None  # a template names what its sweeps mostly vary; here it is known what this one does
    check_report(cfg)
    report(cfg)


# ---- what to compare ---------------------------------------------------------------------------------------------


class Chosen:
    """What the report is about: the user's words, and where there are none, what suits the runs."""

    def __init__(self, cfg: DictConfig, runs: Sequence[Run]) -> None:
        self.by: list[str] = list(cfg.by) if cfg.by is not None else automatic.choose_by(runs)
        self.decoding: str = cfg.decoding or automatic.choose_decoding(runs)
        self.sets: list[str] = list(cfg.sets) if cfg.sets is not None else automatic.choose_sets(runs, self.decoding)
        self.headline: str = cfg.headline or automatic.choose_headline(runs, self.sets, self.decoding)
        self.baseline: str | None = cfg.baseline


def choose(cfg: DictConfig, runs: Sequence[Run]) -> Chosen:
    """Everything that has to be known before runs are grouped. UserError for what they do not have."""
    chosen = Chosen(cfg, runs)
    check_axes(chosen.by, cfg.x, cfg.line)
    check_sets(runs, chosen.sets, chosen.decoding, chosen.headline)
    return chosen


def _check_found(
    cfg: DictConfig, runs: Sequence[Run], unfinished: Sequence[Run], sources: Sequence[str], output: Path
) -> None:
    if cfg.kind == "run" and len(runs) + len(unfinished) > 1:
        raise UserError(
            f"template=run is about one run, and runs={cfg.runs} holds {len(runs) + len(unfinished)}: name one of "
            "them, or use template=sweep"
        )
    if runs:
        return
    also = ""
    if unfinished:
        aggregate.write(unfinished, read_rows(unfinished), sources, output)
        states = ", ".join(sorted(f"{run.name} is {run.state}" for run in unfinished)[:3])
        also = f"; {len(unfinished)} unfinished ({states}), written to {output / aggregate.RUNS}"
    raise UserError(f"runs={cfg.runs}: no finished training run (a results.json of core-torl-train) in it{also}")


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


def _natural(label: str) -> list[Any]:
    """Sorts replaced:4 before replaced:16."""
    return [
        (0, float(part), "") if i % 2 else (1, 0.0, part) for i, part in enumerate(re.split(r"(\d+(?:\.\d+)?)", label))
    ]
