"""Figures inside a page: an SVG file of matplotlib as an element of the HTML, so that the page needs no other file.

Several figures stand in one page, which makes the ids of all of them one set: each figure's ids get a prefix of their
own, or one figure would take its letters and clip paths from another. Everything is read as XML and written anew with
nothing in it but drawing: no script, no comment, no address of another file.
"""

from __future__ import annotations

import re
from pathlib import Path
from xml.etree import ElementTree

from markupsafe import Markup

from core_torl.config.errors import UserError

# What draws nothing, or could do more than draw. The one rule of matplotlib's <style> stands in the page's own.
_LEFT_OUT = {"metadata", "style", "script", "foreignObject", "title", "desc", "image", "a", "animate", "set"}
_REFERENCE = re.compile(r"url\(\s*['\"]?#([^)'\"]+)['\"]?\s*\)")
_LENGTH = re.compile(r"\s*([\d.]+)\s*(pt|px|)\s*")


def inline_svg(path: Path, prefix: str, title: str) -> Markup:
    """The drawing of ``path`` as one ``<svg>`` that takes the width it is given; ``title`` names it to a screen reader.

    ``prefix`` goes before every id and must be another one for each figure of a page. UserError if there is no SVG.
    """
    try:
        root = ElementTree.fromstring(path.read_text(encoding="utf-8"))
    except (ElementTree.ParseError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: no SVG ({error}); draw the figure again") from error
    if _local(root.tag) != "svg":
        raise UserError(f"{path}: no SVG, its root is <{_local(root.tag)}>; draw the figure again")
    _clean(root, prefix)
    size = [_points(root.attrib.pop(side, "")) for side in ("width", "height")]
    if "viewBox" not in root.attrib and all(size):
        root.set("viewBox", f"0 0 {size[0]:g} {size[1]:g}")
    root.set("role", "img")
    root.set("aria-labelledby", f"{prefix}-title")
    if size[0]:
        # No wider than it was drawn: letters would outgrow those of the page.
        root.set("style", f"--drawn: {size[0] * 96 / 72:.0f}px")
    name = ElementTree.Element("title", {"id": f"{prefix}-title"})
    name.text = title
    root.insert(0, name)
    return Markup(ElementTree.tostring(root, encoding="unicode"))  # written by ElementTree, which escapes every text


def _clean(node: ElementTree.Element, prefix: str) -> None:
    """Names without their namespace, ids and what points at them with the prefix, nothing but drawing."""
    node.tag = _local(node.tag)
    attributes = {}
    for full, value in node.attrib.items():
        key = _local(full)
        if key == "id":
            value = f"{prefix}-{value}"
        elif key == "href":
            if not value.startswith("#"):
                continue
            value = f"#{prefix}-{value[1:]}"
        elif key.startswith("on") or full.startswith("{http://www.w3.org/XML"):
            continue
        attributes[key] = _REFERENCE.sub(rf"url(#{prefix}-\1)", value)
    node.attrib.clear()
    node.attrib.update(attributes)
    for child in list(node):
        if _local(child.tag) in _LEFT_OUT:
            node.remove(child)
        else:
            _clean(child, prefix)


def _local(name: object) -> str:
    return str(name).rpartition("}")[2]


def _points(length: str) -> float:
    """A length as matplotlib writes it, ``720pt``, in points; 0 where it says nothing in points or pixels."""
    found = _LENGTH.fullmatch(length)
    if found is None:
        return 0.0
    return float(found[1]) * (0.75 if found[2] != "pt" else 1.0)
