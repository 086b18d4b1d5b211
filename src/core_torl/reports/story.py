"""Everything that a report tells, gathered once; the HTML page, the W&B report and the tables all tell it from here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from core_torl.reports.finished import Group
from core_torl.reports.histories import Histories
from core_torl.tracking.curves import Line

if TYPE_CHECKING:
    import pyarrow as pa


@dataclass(frozen=True)
class Story:
    """A report before it is written.

    ``template`` is core, torl, sweep or run. ``comparison`` holds all numbers, see ``numbers.compare``; ``groups``
    the runs of its cells in the same order. ``histories`` are the logged rows of each run, ``curves`` the lines that
    were drawn from them and ``colours`` the colour of each cell. ``runs`` is the aggregate: a row for each run found,
    finished or not, see ``aggregate``. ``figures`` maps a caption to its SVG file, in the order of the page.
    ``defaults`` are the flat config values of the command without overrides, by which differences are told.
    """

    title: str
    template: str
    comparison: Mapping[str, Any]
    groups: Sequence[Group]
    histories: Histories
    curves: Sequence[Line]
    colours: Mapping[str, str]
    runs: pa.Table
    figures: Mapping[str, Path]
    defaults: Mapping[str, Any]
