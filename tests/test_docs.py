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
COMMAND = re.compile(r"core-torl-(train|evaluate|warm-start|report|watch)\b([^\n`#]*)")
# Options of Hydra's own groups that come with the extra `sweeps`.
PLUGINS = {"joblib": "hydra_joblib_launcher", "submitit": "hydra_submitit_launcher", "optuna": "hydra_optuna_sweeper"}


def commands() -> list[tuple[str, str, str]]:
    found = []
    for path in DOCS:
        for match in COMMAND.finditer(path.read_text()):
            found.append((str(path.relative_to(ROOT)), match[1], match[2].strip()))
    recipes = (ROOT / "Makefile").read_text().replace("\\\n", " ").replace("$(ARGS)", "")
    found += [("Makefile", match[1], match[2].strip()) for match in COMMAND.finditer(recipes)]
    once = {(name, arguments): where for where, name, arguments in reversed(found)}
    return [(where, *command) for command, where in reversed(once.items())]


def installed(plugin: str) -> bool:
    from importlib.util import find_spec

    return find_spec(f"hydra_plugins.{PLUGINS[plugin]}") is not None


@pytest.mark.parametrize(("where", "name", "arguments"), commands())
def test_every_command_in_the_docs_composes(where, name, arguments):
    """With Hydra's own keys; a sweep from its own file, which must belong to the command that it is given to."""
    from hydra import compose, initialize_config_dir

    register()
    words = shlex.split(arguments)
    if "--config-dir" in words:
        pytest.skip(f"{where}: {arguments} needs files that a reader makes")
    # `+reproduce` is replaced by what it names before Hydra sees it.
    overrides = [w for w in words if "=" in w and "lrr" not in w and not w.startswith("+reproduce=")]
    if "-m" in words:  # a sweep's lists are one job each
        overrides = [w if "[" in w else w.split(",")[0] for w in overrides]
    config, folder = name.replace("-", "_"), conf_dir()
    if "-cn" in words:
        sweep = words[words.index("-cn") + 1]
        folder = str(ROOT / words[words.index("-cd") + 1])
        text = (Path(folder) / f"{sweep}.yaml").read_text()
        assert re.search(rf"^  - {config}$", text, re.M), f"{where}: {sweep} is no sweep of core-torl-{name}"
        overrides.append(f"hydra.searchpath=[file://{conf_dir()}]")
        config = sweep
        needed = " ".join([*overrides, *re.findall(r"override hydra/.*", text)])
    else:
        needed = " ".join(overrides)
    for plugin in PLUGINS:
        if plugin in needed and not installed(plugin):
            pytest.skip(f"{where}: {arguments} needs core-torl[sweeps]")
    with initialize_config_dir(folder, version_base=None):
        compose(config, overrides, return_hydra_config=True)


def test_there_are_commands_to_check():
    assert len(commands()) > 15


def test_a_key_that_the_launcher_of_a_sweep_lacks_is_found():
    """The negative control: Hydra's own keys are checked too."""
    with pytest.raises(Exception, match="no_such_key"):
        test_every_command_in_the_docs_composes("x", "train", "-cd sweeps -cn smoke hydra.launcher.no_such_key=2")
    with pytest.raises(AssertionError, match="no sweep of core-torl-report"):
        test_every_command_in_the_docs_composes("x", "report", "-cd sweeps -cn smoke")


def test_every_sweep_stands_in_the_docs_with_its_command_its_report_and_its_jobs():
    text = (ROOT / "docs/sweeps.md").read_text()
    for path in sorted((ROOT / "sweeps").glob("*.yaml")):
        jobs = re.search(r"^# (\d+) jobs\b", path.read_text(), re.M)
        assert jobs and re.search(rf"^\| `{path.stem}` \|.*\| {jobs[1]} \|", text, re.M), path.stem
        assert re.search(rf"^core-torl-(train|warm-start) -cd sweeps -cn {path.stem}$", text, re.M), path.stem
        reported = re.search(rf"^core-torl-report runs=outputs/{path.stem}\b", text, re.M)
        assert reported or "core-torl-warm-start" in path.read_text().split("defaults:")[0], path.stem


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
