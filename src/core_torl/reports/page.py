"""A report as one HTML file: it opens in any browser without a server, a network or a second file.

Numbers and texts are those of ``table.md``; in the page each of them also carries its full value as ``data-value``,
beside ``data-cell`` or ``data-run`` and ``data-metric``, so that a program can hold the page against the aggregate.
Answers of policies, labels and values of configs are foreign text: the template escapes all of it, and the page allows
its browser nothing but the page's own style and its one script, which is known by its hash. Without the script the
page is complete; it only sorts tables and switches between light and dark.
"""

from __future__ import annotations

import base64
import hashlib
import re
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape

from core_torl.reports import page_facts, page_tables
from core_torl.reports.page_figures import inline_svg
from core_torl.reports.page_samples import cell_samples
from core_torl.reports.story import Story
from core_torl.tracking import comparison_table as tables

TEMPLATE, STYLE, SCRIPT = "page.html.jinja", "page.css", "page.js"


def write_page(story: Story, path: Path) -> None:
    """Write the report to ``path``. UserError for a figure or a file of samples that cannot be read."""
    environment = Environment(
        loader=PackageLoader("core_torl.reports"), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    environment.filters["breakable"] = breakable
    style, script = (_source(environment, name) for name in (STYLE, SCRIPT))
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    page = environment.get_template(TEMPLATE).render(
        # Our own files: they hold no text of anyone else, and must not be escaped.
        style=Markup(style), script=Markup(script), script_hash=digest, **_content(story),
    )  # fmt: skip
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page, encoding="utf-8")


def _source(environment: Environment, name: str) -> str:
    assert environment.loader is not None
    return environment.loader.get_source(environment, name)[0]


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:] + ("" if text.endswith(".") else ".")


def _content(story: Story) -> dict[str, Any]:
    """Everything that the template shows, by the names that it has there."""
    comparison = story.comparison
    heads, rows = page_tables.main_table(comparison)
    same, other = page_facts.differences(story)
    return {
        "title": story.title,
        "template": story.template,
        "headline": tables.measure_name(comparison["headline"]),
        "baseline": comparison["baseline"] or ("the baseline of its kind" if tables.baselines(comparison) else None),
        "compared": sum(cell["paired"] is not None for cell in comparison["cells"]),
        "alpha": f"{1 - comparison['confidence']:g}",
        "cells": [cell["label"] for cell in comparison["cells"]],
        "runs": len(page_facts.all_runs(story)),
        "states": page_facts.states(story),
        "facts": page_facts.facts(story),
        "mixed_code": page_facts.mixed_code(story),
        "seeds": page_facts.seeds(story),
        "data": page_facts.data_rows(story),
        "same": same,
        "other": other,
        "heads": heads,
        "rows": rows,
        "headline_metrics": [f"{when}/{comparison['headline']}" for when in ("before", "after")],
        "legend": tables.legend(comparison),
        "notes": comparison["notes"],
        "absent": page_tables.absent_rows(story),
        "final": page_tables.final_table(comparison),
        "run_tables": page_tables.run_tables(story),
        "figures": [
            {"id": f"figure-{i}", "caption": _sentence(caption), "svg": inline_svg(file, f"figure-{i}", caption)}
            for i, (caption, file) in enumerate(story.figures.items(), start=1)
        ],
        "samples": [found for one in story.groups if (found := cell_samples(one)).blocks or found.broken],
        "compute": page_tables.compute_table(story),
        "label_width": max(len(cell["label"]) for cell in comparison["cells"]) + 2,
    }


def breakable(text: str) -> Markup:
    """The text, escaped, with places after its slashes, underscores and dots where a line may break."""
    return Markup("<wbr>").join(escape(part) for part in re.split(r"(?<=[/_.])(?=.)", text))
