"""The report as a page in Weights & Biases: the story of the HTML page, with W&B's own panels where it has pictures.

Texts and tables are those of ``table.md`` and the page. Panels show the runs of the table, found by their W&B ids where
all runs recorded one, grouped by what the comparison is grouped by. The report is made without an account and can be
written to a file as the very model that W&B stores; only saving it on the server needs a login.

Our configs are flat in W&B: ``variant.lr`` is one key and not a key in a mapping. Panels know it as
``variant.lr.value``; without ``.value`` wandb-workspaces takes it for ``lr`` inside of ``variant`` and finds nothing.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any
from urllib.parse import quote

from core_torl.config.errors import UserError
from core_torl.reports import page_facts
from core_torl.reports.finished import Run
from core_torl.reports.page_tables import absent_rows
from core_torl.reports.story import Story
from core_torl.tracking.comparison_table import markdown, measure_name
from core_torl.tracking.metrics import STEP, find

MODES = ("json", "draft", "publish")
FILE = "wandb_report.json"
AXES = {STEP: "RL step", "train/sampled_tokens": "sampled tokens"}
CURVES = ("reward/accuracy",)  # where the story has no curves of its own
CHOICES = "choices"  # run configs in W&B hold the option of each config group under choices.GROUP
ROLLOUTS = {"core": ("triggered", "newly_solved"), "torl": ("tools", "newly_solved")}  # by template
_ROLLOUTS = ("triggered", "tools", "newly_solved")
_LONGEST_TITLE = 128
_COMMANDS = 12  # that are shown
_WIDTH = 24  # of a report's grid of panels


def publish(story: Story, *, mode: str, entity: str | None, project: str, output: Path) -> str | None:
    """Make the report: ``json`` writes ``wandb_report.json`` into ``output``, ``draft`` and ``publish`` save it in W&B.

    Returns the address of a saved report. UserError where wandb-workspaces is missing, nobody is logged in, the project
    is not there, or the server fails. An ``entity`` of None is the login's own.
    """
    if mode not in MODES:
        raise UserError(f"W&B report {mode!r}: use {', '.join(MODES)}")
    try:
        wr: Any = import_module("wandb_workspaces.reports.v2")
    except ImportError as error:
        raise UserError("a W&B report needs wandb-workspaces: pip install 'core-torl[reports]'") from error
    if mode == "json":
        # A set of runs that names its project would be looked up on the server; without, it is the report's own.
        report = _report(story, wr, entity or "", project, wr.Runset())
        output.mkdir(parents=True, exist_ok=True)
        (output / FILE).write_text(
            report._to_model().model_dump_json(by_alias=True, exclude_none=True, indent=1) + "\n"
        )
        return None
    return _save(story, wr, mode, entity, project)


def _save(story: Story, wr: Any, mode: str, entity: str | None, project: str) -> str:
    import wandb
    from wandb.errors import Error, UsageError

    try:
        entity = entity or str(wandb.Api().default_entity)
        report = _report(story, wr, entity, project, wr.Runset(entity=entity, project=project))
        report.save(draft=mode == "draft")
        return str(report.url)
    except UsageError as error:
        raise UserError("a W&B report needs a login: run `wandb login`, or set WANDB_API_KEY") from error
    except Error as error:
        raise UserError(f"W&B does not take the report ({_first_line(error)})") from error
    except Exception as error:
        # What wandb-workspaces raises has no types of its own; anything that it did not say itself is a bug of ours.
        text = _first_line(error)
        if "not logged in" in text:
            raise UserError("a W&B report needs a login: run `wandb login`, or set WANDB_API_KEY") from error
        if "not found" in text and isinstance(error, ValueError):
            raise UserError(
                f"W&B has no project {entity}/{project}, or none that you may read: send its runs first (wandb sync)"
            ) from error
        raise


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or ["no reason given"])[0]


# ---- the report --------------------------------------------------------------------------------------------------


def _report(story: Story, wr: Any, entity: str, project: str, runset: Any) -> Any:
    runset.name = story.title
    runset.filters, which = run_filter(story)
    runset.groupby = [f"config.{key}" for key in group_keys(story)]
    return wr.Report(
        entity=entity, project=project, title=story.title[:_LONGEST_TITLE], description=_counts(story), width="fluid",
        blocks=[
            *_warning(story, wr),
            wr.H1("What was run"), *_made(story, wr),
            wr.H1("Results"), wr.MarkdownBlock(_without_title(markdown(story.comparison))),
            wr.H1("Curves and runs"), wr.P(which), wr.PanelGrid(runsets=[runset], panels=_panels(story, wr)),
            wr.H1("What the policies wrote"),
            wr.PanelGrid(runsets=[runset], panels=_rollouts(story, wr)),
            wr.H1("Compute"), wr.MarkdownBlock(_compute(story)),
            wr.H1("Runs and their files"), wr.MarkdownBlock(_links(story, entity, project)),
        ],
    )  # fmt: skip


def _counts(story: Story) -> str:
    states = ", ".join(f"{count} {state}" for state, count in page_facts.states(story))
    runs, cells = len(page_facts.all_runs(story)), len(story.groups)
    return f"{runs} runs in {cells} cells; runs found: {states}. {measure_name(story.comparison['headline'])}."


def _warning(story: Story, wr: Any) -> list[Any]:
    """The runs that are in no cell and those of more than one code, before anything else; nothing without any."""
    rows, mixed = absent_rows(story), page_facts.mixed_code(story)
    code = [
        wr.CalloutBlock(f"Made by more than one version of the code: {len(mixed)} runs."),
        wr.MarkdownBlock(_table(("run",), [(run,) for run in mixed])),
    ]
    if not rows:
        return code if mixed else []
    return [
        *(code if mixed else []),
        wr.CalloutBlock(f"Not in the table: {len(rows)} of {len(rows) + len(page_facts.all_runs(story))} runs."),
        wr.MarkdownBlock(_table(("run", "state", "why"), [(row["folder"], row["state"], row["why"]) for row in rows])),
    ]


def _made(story: Story, wr: Any) -> list[Any]:
    """Commands as code; versions, seeds, data and config differences as tables."""
    facts = page_facts.facts(story)
    commands = [value for fact in facts if fact.name == "command" for value, _ in fact.values]
    if len(commands) > _COMMANDS:
        commands[_COMMANDS:] = [f"# and {len(commands) - _COMMANDS} others"]
    rows = [
        ("last command of the sweep" if fact.name == "sweep" else fact.name, value, f"{count} of {fact.total}")
        for fact in facts if fact.name != "command" for value, count in fact.values
    ]  # fmt: skip
    blocks = [wr.CodeBlock("\n".join(commands), language=None), wr.MarkdownBlock(_table(("", "value", "runs"), rows))]
    blocks.append(wr.MarkdownBlock(_table(("cells", "seeds"), page_facts.seeds(story))))
    if data := page_facts.data_rows(story):
        keys = ("name", "problems", "sha256", "runs")
        blocks.append(wr.MarkdownBlock(_table(("data", *keys[1:]), [[row[key] for key in keys] for row in data])))
    same, other = page_facts.differences(story)
    differing = [
        (one.key, one.default, value, ", ".join(cells) or "all")
        for one in (*same, *other) for value, cells in one.values
    ]  # fmt: skip
    blocks.append(wr.H2("Config, where it is not the default"))
    if differing:
        blocks.append(wr.MarkdownBlock(_table(("key", "default", "value", "cells"), differing)))
    else:
        blocks.append(wr.P("All runs have the default config."))
    return blocks


def run_filter(story: Story) -> tuple[str, str]:
    """The filter of the panels' runs as wandb-workspaces writes one, and a sentence that says which runs these are.

    The very runs of the table where all have recorded their W&B id; else the runs of their groups; else, as a last
    resort, those of the whole project.
    """
    runs = page_facts.all_runs(story)
    ids = [run.record.get("wandb_id") for run in runs]
    if all(ids):
        return f"Metric('ID') in {ids!r}", "The panels show the runs of the table."
    groups = [_logger(run).get("group") for run in runs]
    if all(groups):
        names = sorted({str(group) for group in groups})
        return f"Metric('Group') in {names!r}", f"The panels show all runs of the W&B groups {', '.join(names)}."
    return "", (
        "The runs of the table have recorded neither W&B ids nor groups: the panels show all runs of the project, "
        "others among them."
    )


def group_keys(story: Story) -> list[str]:
    """What the comparison is grouped by, as W&B's keys of flat configs, such as ``variant.lr.value``."""
    runs = page_facts.all_runs(story)
    options = set().union(*(run.choices for run in runs))
    return [f"{CHOICES}.{name}.value" if name in options else f"{name}.value" for name in story.comparison["by"]]


def _panels(story: Story, wr: Any) -> list[Any]:
    """Each metric over RL steps and over sampled tokens; then the headline as bars, and the runs compared."""
    told = story.comparison.get("curves") or {}
    names = list(told.get("metrics") or dict.fromkeys(line.metric for line in story.curves) or CURVES)
    half, panels = _WIDTH // 2, []
    for row, name in enumerate(names):
        known = find(name)
        for column, (axis, words) in enumerate(AXES.items()):
            panels.append(
                wr.LinePlot(
                    title=f"{name} over {words}", x=axis, y=[name], title_x=words,
                    title_y=name if known is None else f"{name} ({known.unit})",
                    # Seeds are one line, in a band from the lowest to the highest.
                    groupby_aggfunc="mean", groupby_rangefunc="minmax",
                    layout=wr.Layout(x=half * column, y=8 * row, w=half, h=8),
                )
            )  # fmt: skip
    headline, below = story.comparison["headline"], 8 * len(names)
    panels.append(
        wr.BarPlot(
            title=f"{measure_name(headline)} after training, mean of seeds", metrics=[f"eval/{headline}"],
            groupby_aggfunc="mean", groupby_rangefunc="minmax", layout=wr.Layout(x=0, y=below, w=half, h=8),
        )
    )  # fmt: skip
    panels.append(wr.RunComparer(diff_only="split", layout=wr.Layout(x=half, y=below, w=half, h=8)))
    return panels


def _rollouts(story: Story, wr: Any) -> list[Any]:
    """Tables of answers, one below the other, with a slider over the steps."""
    return [
        wr.MediaBrowser(
            title=f"rollouts: {kind.replace('_', ' ')}", media_keys=[f"rollouts/{kind}"], mode="gallery",
            gallery_axis="step", layout=wr.Layout(x=0, y=12 * row, w=_WIDTH, h=12),
        )
        for row, kind in enumerate(ROLLOUTS.get(story.template, _ROLLOUTS))
    ]  # fmt: skip


def _compute(story: Story) -> str:
    heads = ("cell", "runs", "wall time", "training", "RL steps", "sampled tokens", "answers", "attempts", "hardware")
    return _table(heads, [
        (one.label, str(one.runs), *map(page_facts.duration, (one.wall_s, one.train_s, one.steps_s)),
         *map(page_facts.count, (one.sampled_tokens, one.samples, one.attempts)), one.hardware)
        for one in page_facts.compute(story)
    ])  # fmt: skip


def _links(story: Story, entity: str, project: str) -> str:
    """A row for each run, with links to its page and its artifacts where its W&B id is known."""
    rows = []
    for one in story.groups:
        for seed, run in sorted(one.runs.items()):
            mark = run.record.get("wandb_id")
            files = [] if mark is None else [
                _link(f"{kind}-{mark}", entity, project, "artifacts", kind, f"{kind}-{mark}")
                for kind in _logger(run).get("artifacts") or []
            ]  # fmt: skip
            page = page_facts.NOT_RECORDED if mark is None else _link(mark, entity, project, "runs", mark)
            rows.append((_escaped(one.label), str(seed), _escaped(run.name), page, ", ".join(files) or "none"))
    return _table(("cell", "seed", "folder", "run", "artifacts"), rows, escape=False)


def _link(text: str, entity: str, project: str, *parts: str) -> str:
    """A link into the project; plain text where no entity is known yet."""
    if not entity:
        return text
    base = os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai").rstrip("/").replace("//api.wandb.", "//wandb.")
    return f"[{text}]({base}/{'/'.join(quote(part, safe='') for part in (entity, project, *parts))})"


# ---- small things ------------------------------------------------------------------------------------------------


def _logger(run: Run) -> Mapping[str, Any]:
    """The run's ``logger`` keys; W&B knows configs flat, results have them nested."""
    config = run.results["run"].get("config") or {}
    flat = {key.removeprefix("logger."): value for key, value in config.items() if key.startswith("logger.")}
    return config.get("logger") or flat


def _without_title(text: str) -> str:
    """``table.md`` without its first line: the report has its own title."""
    return text.partition("\n")[2].lstrip("\n")


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]], escape: bool = True) -> str:
    """A Markdown table; text that would end a cell or a row is escaped."""
    lines = [heads, ["---"] * len(heads), *([_escaped(cell) for cell in row] if escape else row for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _escaped(text: str) -> str:
    return " ".join(str(text).replace("\\", "\\\\").replace("|", "\\|").split())
