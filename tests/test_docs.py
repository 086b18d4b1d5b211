"""The docs are true: every command in them composes, every file they name exists, the glossary is the registry's."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from core_torl.config.paths import conf_dir
from core_torl.config.schema import register
from core_torl.tracking.metrics import glossary_markdown

ROOT = Path(__file__).parents[1]
DOCS = sorted(
    [
        ROOT / "README.md",
        ROOT / "CONTRIBUTING.md",
        *(ROOT / "docs").rglob("*.md"),
        *ROOT.glob("src/core_torl/model/shipped/*/README.md"),
    ]
)
COMMAND = re.compile(r"core-torl-(train|evaluate|warm-start|report)\b([^\n`#]*)")


def commands() -> list[tuple[str, str, str]]:
    found = []
    for path in DOCS:
        for match in COMMAND.finditer(path.read_text()):
            found.append((str(path.relative_to(ROOT)), match[1], match[2].strip()))
    recipes = (ROOT / "Makefile").read_text().replace("\\\n", " ").replace("$(ARGS)", "")
    found += [("Makefile", match[1], match[2].strip()) for match in COMMAND.finditer(recipes)]
    return found


@pytest.mark.parametrize(("where", "name", "arguments"), commands())
def test_every_command_in_the_docs_composes(where, name, arguments, tmp_path):
    from hydra import compose, initialize_config_dir

    register()
    words = [w for w in shlex.split(arguments) if "=" in w and "lrr" not in w]
    if "--config-dir" in arguments:
        pytest.skip(f"{where}: {arguments} needs files that a reader makes")
    # A sweep's lists are one job each; hydra.* belongs to Hydra itself.
    overrides = [
        w.split(",")[0] if "-m " in f"{arguments} " and "[" not in w else w for w in words if not w.startswith("hydra")
    ]
    with initialize_config_dir(conf_dir(), version_base=None):
        compose(
            {"train": "train", "evaluate": "evaluate", "warm-start": "warm_start", "report": "report"}[name], overrides
        )


def test_there_are_commands_to_check():
    assert len(commands()) > 15


def test_the_one_wrong_command_in_the_readme_reads_as_it_says(monkeypatch, capsys):
    from core_torl.train import main

    wrong, error = re.search(r"\$ core-torl-train (\S+)\n(core-torl: .*)", (ROOT / "README.md").read_text()).groups()
    monkeypatch.setattr("sys.argv", ["core-torl-train", wrong])
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 2
    assert capsys.readouterr().err == f"{error}\n"


@pytest.mark.parametrize("path", DOCS, ids=lambda p: str(p.relative_to(ROOT)))
def test_every_file_that_the_docs_name_exists(path):
    text = path.read_text()
    linked = set(re.findall(r"\]\(([^)#:]+)\)", text))
    named = set(re.findall(r"`((?:tests|docs|benchmarks|conf|src)/[\w./-]+)`", text))
    missing = [m for m in linked if not (path.parent / m).exists()] + [m for m in named if not (ROOT / m).exists()]
    assert not missing


def test_functions_named_in_the_paper_index_exist():
    from importlib import import_module

    for dotted in re.findall(
        r"`((?:objective|variant|evaluation|data|config)\.[\w.]+)`", (ROOT / "docs/papers.md").read_text()
    ):
        if dotted.startswith("data.path") or dotted.count(".") < 2:
            continue
        module, rest = dotted.split(".")[:2], dotted.split(".")[2:]
        thing = import_module("core_torl." + ".".join(module))
        if not hasattr(thing, rest[0]):  # a method named without its class
            assert any(hasattr(v, rest[0]) for v in vars(thing).values() if isinstance(v, type)), dotted
            continue
        for part in rest:
            thing = getattr(thing, part)


def test_the_glossary_is_the_registrys():
    assert glossary_markdown().strip() in (ROOT / "docs/metrics.md").read_text()
