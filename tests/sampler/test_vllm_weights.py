"""Weights as files for servers to read: whole checkpoints, in parts, never half of one."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

from core_torl.config.errors import UserError
from core_torl.sampler import vllm_weights
from core_torl.sampler.vllm_weights import WeightFolders
from tests.sampler.record_vllm import policy, sampler_of


@pytest.fixture(scope="module")
def policies():
    return policy(0), policy(1)


def test_written_weights_are_a_checkpoint_in_parts_and_only_the_newest_is_kept(tmp_path, policies, monkeypatch):
    monkeypatch.setattr(vllm_weights, "SHARD_BYTES", 100_000)
    folders = WeightFolders(str(tmp_path))
    first = folders.write_merged(policies[0], "0")
    second = folders.write_merged(policies[1], "a/b")
    assert sorted(p.parent for p in folders.root.glob("*/*.json")) == [first, second]
    files = sorted(second.glob("*.safetensors"))
    assert len(files) > 2 and not list(folders.root.glob("*.part"))
    index = json.loads((second / "model.safetensors.index.json").read_text())["weight_map"]
    read = {n: t for f in files for n, t in load_file(f).items()}
    assert read.keys() == index.keys()
    own = policies[1].model.state_dict()
    assert all(torch.equal(t, own[n]) for n, t in read.items())
    folders.keep_only(second)
    assert [p.name for p in folders.root.iterdir()] == [second.name]
    folders.close()
    assert not list(tmp_path.iterdir())


def test_weights_are_written_in_the_number_format_that_is_asked_for(tmp_path, policies):
    """Half the bytes, and what the trainer holds stays as it is."""
    own = policies[0].model.state_dict()
    whole = WeightFolders(str(tmp_path)).write_merged(policies[0], "0")
    half = WeightFolders(str(tmp_path), "bfloat16").write_merged(policies[0], "0")
    read = load_file(next(half.glob("*.safetensors")))
    assert read and all(torch.equal(t, own[n].to(torch.bfloat16)) for n, t in read.items())
    sizes = [sum(f.stat().st_size for f in folder.glob("*.safetensors")) for folder in (whole, half)]
    assert sizes[1] < 0.55 * sizes[0]
    assert {t.dtype for t in own.values()} == {torch.float32}


def test_a_folder_that_is_half_written_is_never_a_version(tmp_path, policies):
    class Broken:
        adapted = False

        def merged(self):
            yield from list(policies[0].merged())[:3]
            raise OSError(28, "No space left on device")

    folders = WeightFolders(str(tmp_path))
    with pytest.raises(UserError, match=r"sampler\.sync_dir: cannot write weights .*No space left on device"):
        folders.write_merged(Broken(), "0")
    assert not [p for p in folders.root.iterdir() if not p.name.endswith(".part")]


def test_a_disk_that_is_full_lets_every_tensor_be_gathered(tmp_path, policies, monkeypatch):
    """Ranks gather shards together: one that stopped half-way would leave the others waiting. One line says what to do."""
    import safetensors.torch
    from safetensors import SafetensorError

    gathered = []

    class Counted:
        adapted = False

        def merged(self):
            for name, tensor in policies[0].merged():
                gathered.append(name)
                yield name, tensor

    def full(*args, **kwargs):
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(safetensors.torch, "save_file", full)
    monkeypatch.setattr("core_torl.sampler.vllm_weights.SHARD_BYTES", 1)
    with pytest.raises(UserError, match=r"sampler\.sync_dir: cannot write weights .*No space left") as error:
        WeightFolders(str(tmp_path)).write_merged(Counted(), "0")
    assert "\n" not in str(error.value)
    assert gathered == [name for name, _ in policies[0].merged()]


def test_writing_a_model_to_start_from_has_config_and_tokenizer(tmp_path, policies):
    from transformers import AutoConfig, AutoTokenizer

    folders = WeightFolders(str(tmp_path))
    folder = folders.write_model("base", policies[0].merged(), policies[0].model.config, policies[0].tokenizer)
    assert AutoConfig.from_pretrained(folder).vocab_size == policies[0].model.config.vocab_size
    assert len(AutoTokenizer.from_pretrained(folder)) == len(policies[0].tokenizer)


def test_the_number_format_is_that_of_started_servers_and_of_written_weights(policies, tmp_path, monkeypatch):
    from core_torl.sampler import vllm_replicas, vllm_server

    monkeypatch.setattr(vllm_server, "check_vllm", lambda: "0.32.0")
    started = []

    def start_all(replicas, folder):
        written = {str(t.dtype) for f in folder.glob("*.safetensors") for t in load_file(f).values()}
        started.append((replicas[0].launch.command(folder, 1), written))
        raise UserError("no further")

    monkeypatch.setattr(vllm_replicas, "start_all", start_all)
    for dtype, name in (("bfloat16", "bfloat16"), (None, "float32")):
        sampler = sampler_of(policies[0], [], dtype=dtype, max_model_len=77, log_dir=str(tmp_path))
        assert sampler.max_model_len == 77
        with pytest.raises(UserError, match="no further"):
            sampler.sync(policies[0], "0")
        sampler.close()
        command, written = started.pop()
        assert command[command.index("--dtype") + 1] == name and written == {f"torch.{name}"}
