"""The schema holds exactly what the code reads: no key that nothing reads, no parameter that no key reaches."""

from __future__ import annotations

import dataclasses
import inspect
import re
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import yaml

from core_torl.config.group_schema import LoraConfig
from core_torl.config.schema import SCHEMAS, EvaluateConfig, ReportConfig, TrainConfig, WarmStartConfig, WatchConfig

ROOT = Path(__file__).parents[2]
SRC = ROOT / "src" / "core_torl"
# Parameters that the program gives, not the config: models, data, counts that belong to several groups.
FROM_THE_PROGRAM = {
    "variant": {
        "policy", "sampler", "reward_function", "objective", "problems", "encode", "rl_steps", "group_size",
        "prompts_per_step", "seed", "temperature", "fingerprint", "augment", "token_budget", "encode_answer",
        "trigger", "intervention", "max_prompt_tokens",
    },
    "intervention": {"problems"},
    "sampler": {"model", "tokenizer", "eos_ids"},
    "tool": {"sampler", "sandbox", "tokenizer"},
    "model": {"device"},
}  # fmt: skip
# Keys of a group that another part reads than the one its _target_ names.
READ_ELSEWHERE = {"model": {"prompt", "max_prompt_tokens", "max_new_tokens"}}
GROUPS_WITHOUT_TARGET = ("trainer", "callbacks", "logger", "paths")


def schema_of(path: Path) -> str | None:
    for entry in (yaml.safe_load(path.read_text()) or {}).get("defaults", []):
        if isinstance(entry, dict) and "/schema@_here_" in entry:
            return entry["/schema@_here_"]
    return None


def written(path: Path) -> list[str]:
    """Keys that a file gives a value, those of the pieces it includes with ``NAME@_here_`` among them."""
    raw = yaml.safe_load(path.read_text())
    keys = [key for key in raw if key != "defaults"]
    for entry in raw.get("defaults", []):
        if isinstance(entry, str) and entry.endswith("@_here_"):
            keys += written(path.parent / f"{entry.removesuffix('@_here_')}.yaml")
    return keys


USED = {p.relative_to(ROOT / "conf"): s for p in sorted((ROOT / "conf").rglob("*.yaml")) if (s := schema_of(p))}
TARGETS = {
    str(f): (f.parts[0], s, t)
    for f, s in USED.items()
    if (t := yaml.safe_load((ROOT / "conf" / f).read_text()).get("_target_"))
}


def parameters(target: Any) -> set[str]:
    """Names that a call may give; ``**kwargs`` of a class stands for what the next class in line takes."""
    found: set[str] = set()
    makers = [c.__init__ for c in target.__mro__ if "__init__" in vars(c)] if inspect.isclass(target) else [target]
    for make in makers:
        kinds = inspect.signature(make).parameters.values()
        found |= {p.name for p in kinds if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
        if not any(p.kind is p.VAR_KEYWORD for p in kinds):
            break
    return found - {"self"}


def names(schema: str | type) -> set[str]:
    return {f.name for f in dataclasses.fields(SCHEMAS[schema] if isinstance(schema, str) else schema)}


def source(*patterns: str) -> str:
    files = sorted({f for pattern in patterns for f in SRC.glob(pattern)})
    assert files
    return "\n".join(f.read_text() for f in files if f.name not in ("schema.py", "group_schema.py"))


def test_every_schema_is_used_by_a_file_and_every_file_uses_a_known_one():
    assert set(USED.values()) == set(SCHEMAS)


@pytest.mark.parametrize(("group", "schema", "target"), TARGETS.values(), ids=TARGETS.keys())
def test_fields_are_the_parameters_of_the_target(group: str, schema: str, target: str):
    pytest.importorskip("torch")
    module, name = target.rsplit(".", 1)
    taken = parameters(getattr(import_module(module), name)) - FROM_THE_PROGRAM.get(group, set())
    assert names(schema) - {"_target_"} - READ_ELSEWHERE.get(group, set()) == taken


@pytest.mark.parametrize("file", [f for f in USED if f.stem not in SCHEMAS or f.parent != Path()], ids=str)
def test_a_file_gives_every_field_of_its_schema_a_value(file: Path):
    """A key that is missing in the YAML would be mandatory without anyone having said so."""
    keys = written(ROOT / "conf" / file)
    chosen = {"prompt", "observation"}  # options of a group of their own
    assert names(USED[file]) - chosen == set(keys) - chosen


def test_shared_pieces_are_all_included_and_give_no_key_twice():
    """A key in two pieces of one option would depend on their order."""
    # Those of recipes are whole-config files; see test_recipes.py.
    pieces = {p.stem for p in (ROOT / "conf").glob("*/common/*.yaml") if p.parts[-3] != "experiment"}
    included: set[str] = set()
    for file in USED:
        keys = written(ROOT / "conf" / file)
        assert len(keys) == len(set(keys)), file
        included |= set(re.findall(r"- common/(\w+)@_here_", (ROOT / "conf" / file).read_text()))
    assert included == pieces and pieces


def test_a_target_is_implemented_in_the_package_of_its_group():
    for file, (group, _, target) in TARGETS.items():
        # Hydra takes launchers from a package of its own only.
        package = "hydra_plugins.core_torl_launcher" if group == "hydra" else f"core_torl.{group}"
        assert target.startswith(f"{package}."), file


def test_prompt_fields_are_those_of_the_template():
    template = pytest.importorskip("core_torl.data.prompt").PromptTemplate
    assert names("prompt") == {f.name for f in dataclasses.fields(template)}


def test_lora_keys_are_read():
    text = source("model/*.py")
    assert [n for n in names(LoraConfig) if f'lora["{n}"]' not in text] == []


def test_model_keys_that_the_loader_ignores_are_read_elsewhere():
    text = source("**/*.py") + (ROOT / "conf/sampler/transformers.yaml").read_text()
    assert [k for k in READ_ELSEWHERE["model"] if not re.search(rf"\bmodel\.{k}\b", text)] == []


@pytest.mark.parametrize("schema", GROUPS_WITHOUT_TARGET)
def test_keys_of_a_group_without_target_are_read(schema: str):
    text = source("**/*.py") + "".join(
        re.findall(r"\$\{[^}]*\}", "".join(p.read_text() for p in ROOT.glob("conf/**/*.yaml")))
    )
    assert [n for n in sorted(names(schema)) if not re.search(rf"\b{schema}\.{n}\b", text)] == []


@pytest.mark.parametrize(
    ("schema", "files"),
    [
        (TrainConfig, ("train.py", "runs/training.py", "runs/assemble.py", "runs/results.py")),
        (EvaluateConfig, ("evaluate.py", "runs/evaluation.py", "runs/assemble.py", "runs/results.py")),
        (WarmStartConfig, ("warm_start.py", "runs/warming*.py")),
        (ReportConfig, ("report.py", "reports/*.py")),
        (WatchConfig, ("watch.py", "launch/view*.py")),
    ],
    ids=lambda x: getattr(x, "__name__", ""),
)
def test_top_level_keys_are_read_by_their_own_front_door(schema: type, files: tuple[str, ...]):
    text = source(*files)
    # `paths` serves interpolations in the YAML files as well.
    unread = [n for n in sorted(names(schema)) if not re.search(rf"\bcfg\.{n}\b", text) and n != "paths"]
    assert unread == []
