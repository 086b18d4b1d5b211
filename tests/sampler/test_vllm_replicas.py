"""vLLM servers that a run starts itself: the command, the watch over them, and what they say when they fail.

No vLLM here: small Python programs stand in for the server process.
"""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from core_torl.config.errors import UserError
from core_torl.sampler.vllm_replicas import Launch, Replica, last_error


def test_the_command_and_environment_of_a_server():
    plain = Launch(
        dtype="bfloat16", max_model_len=4096, gpus=("1", "2,3"), tensor_parallel=2, extra_args=("--seed", "3")
    )
    command = plain.command(Path("/w"), 8123)
    text = " ".join(command)
    assert command[:3] == [sys.executable, "-m", "vllm.entrypoints.openai.api_server"]
    for part in (
        "--model /w", "--port 8123", "--host 127.0.0.1", "--dtype bfloat16", "--max-model-len 4096",
        "--logprobs-mode processed_logprobs", "--generation-config vllm", "--tensor-parallel-size 2", "--seed 3",
        "--worker-extension-cls core_torl.sampler.vllm_worker.WorkerExtension",
    ):  # fmt: skip
        assert part in text
    assert not {"--enable-lora", "--enable-sleep-mode", "--enforce-eager", "--block-size"} & set(command)
    assert plain.variables(1)["CUDA_VISIBLE_DEVICES"] == "2,3" and plain.variables(0)["VLLM_SERVER_DEV_MODE"] == "1"
    full = Launch(
        dtype="float32",
        max_model_len=64,
        lora_rank=12,
        sleep_mode=True,
        enforce_eager=True,
        block_size=16,
        kv_cache_mb=2,
    ).command(Path("/w"), 1)
    assert full[full.index("--max-lora-rank") + 1] == "16"
    assert full[full.index("--kv-cache-memory-bytes") + 1] == str(2 << 20)
    assert {"--enable-lora", "--enable-sleep-mode", "--enforce-eager"} <= set(full)


def test_a_server_that_does_not_start_says_why_and_where(tmp_path, monkeypatch):
    script = "import sys; print('ValueError: No room for the KV cache'); sys.exit(3)"
    monkeypatch.setattr(Launch, "command", lambda self, folder, port: [sys.executable, "-c", script])
    replica = Replica(Launch(dtype="float32", max_model_len=64, log_dir=tmp_path), 0, timeout_s=1, connections=1)
    replica.start(tmp_path)
    with pytest.raises(UserError, match=r"did not start .ValueError: No room for the KV cache.*server-0\.log"):
        replica.wait()
    replica.stop()


def test_a_port_that_is_taken_is_not_shared(tmp_path):
    """Whoever listens there, another run's server say, would be handed our weights and asked for our answers."""
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        launch = Launch(dtype="float32", max_model_len=64, log_dir=tmp_path, port=port)
        with pytest.raises(UserError, match=rf"sampler\.port: something listens on 127\.0\.0\.1:{port} already"):
            Replica(launch, 0, timeout_s=1, connections=1).start(tmp_path)


def test_a_server_that_takes_too_long_is_ended(tmp_path, monkeypatch):
    monkeypatch.setattr(
        Launch, "command", lambda self, folder, port: [sys.executable, "-c", "import time; time.sleep(60)"]
    )
    launch = Launch(dtype="float32", max_model_len=64, log_dir=tmp_path, start_timeout_s=0.5)
    replica = Replica(launch, 0, timeout_s=1, connections=1)
    replica.start(tmp_path)
    with pytest.raises(UserError, match=r"sampler\.start_timeout_s=0\.5: a vLLM server was not ready.*server-0\.log"):
        replica.wait()
    assert not replica.running


# A server and its engine process, which ends with nobody.
TREE = """
import os, subprocess, sys, time
engine = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
print("pids", os.getpid(), engine.pid, flush=True)
time.sleep(60)
"""
PARENT = """
import sys, time
from pathlib import Path
from core_torl.sampler.vllm_replicas import Launch, Replica
Launch.command = lambda self, folder, port: [sys.executable, "-c", {tree!r}]
replica = Replica(Launch(dtype="float32", max_model_len=64, log_dir=Path(sys.argv[1])), 0, timeout_s=1, connections=1)
replica.start(Path("."))
time.sleep(60)
"""


def there(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def wait_for(what, seconds: float = 20.0) -> bool:
    give_up = time.monotonic() + seconds
    while not what() and time.monotonic() < give_up:
        time.sleep(0.05)
    return bool(what())


def pids_in(log: Path) -> list[int]:
    found = re.search(r"pids (\d+) (\d+)", log.read_text() if log.is_file() else "")
    return [int(x) for x in found.groups()] if found else []


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("ends", ["the trainer is killed", "the server is killed"])
def test_servers_leave_nothing_behind(tmp_path, ends):
    """Neither when the trainer dies without a word, nor when the server does and its engine processes live on."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    parent = subprocess.Popen([sys.executable, "-c", PARENT.format(tree=TREE), str(tmp_path)], env=environment)
    try:
        assert wait_for(lambda: pids_in(tmp_path / "server-0.log"), 60)
        server, engine = pids_in(tmp_path / "server-0.log")
        assert there(server) and there(engine)
        os.kill(parent.pid if "trainer" in ends else server, signal.SIGKILL)
        parent.wait() if "trainer" in ends else None
        assert wait_for(lambda: not there(server) and not there(engine))
    finally:
        parent.kill()
        parent.wait()


def test_the_reason_is_found_in_a_servers_output(tmp_path):
    log = tmp_path / "log"
    log.write_text(
        "(EngineCore pid=9) INFO 11-22 10:19:56 [x.py:1] starting\n"
        "(EngineCore pid=9) ERROR 11-22 10:19:57 [core.py:1] ValueError: head_dim=8 is not supported\n"
        "RuntimeError: Engine core initialization failed. See root cause above.\n"
        "core-torl: the server ended (1)\n"
    )
    assert last_error(log) == "ValueError: head_dim=8 is not supported"
    assert last_error(tmp_path / "none") == "it said nothing"
