"""The HTTP client against a server that fails in every way that real ones were seen to."""

from __future__ import annotations

import socket
import time

import pytest

from core_torl.config.errors import UserError
from core_torl.sandbox import sandbox_fusion
from core_torl.sandbox.sandbox_fusion import SandboxFusion
from tests.sandbox.fake_fusion import FakeFusion

FAST = {"timeout_s": 2.0, "retries": 2, "backoff_s": 0.01, "concurrency": 4}


@pytest.fixture
def fake():
    server = FakeFusion()
    yield server
    server.close()


@pytest.fixture
def sandbox(fake):
    client = SandboxFusion(url=fake.url, **FAST)
    client.start()
    yield client
    client.close()


def test_what_is_sent(fake, sandbox):
    sandbox.submit("print(5)").result()
    path, body = fake.requests[-1]
    assert path == "/run_code"
    assert body == {"code": "print(5)", "language": "python", "run_timeout": 2.0, "memory_limit_MB": 1024}


def test_the_client_waits_longer_than_the_program_may_take(sandbox):
    assert sandbox._client.timeout.read > sandbox.timeout_s + 5


@pytest.mark.parametrize("mode", ["http_500", "no_json", "other_json", "hangs_up", "sandbox_error"])
def test_failures_of_the_server_are_repeated_and_then_are_infrastructure(fake, sandbox, mode):
    before, fake.mode = len(fake.requests), mode
    result = sandbox.submit("print(1)").result()
    assert (result.status, result.stdout) == ("infrastructure", "") and result.detail
    assert len(fake.requests) - before == 3


def test_a_passing_failure_costs_nothing(fake, sandbox):
    fake.failures = 2
    assert sandbox.submit("print(6)").result().stdout == "6\n"


def test_a_server_that_does_not_answer_in_time(fake, monkeypatch):
    monkeypatch.setattr(sandbox_fusion, "GRACE_S", 0.3)
    with_short_wait = SandboxFusion(url=fake.url, timeout_s=0.5, retries=1, backoff_s=0.01)
    with_short_wait.start()
    fake.mode = "sleeps"
    assert with_short_wait.submit("print(1)").result().status == "infrastructure"
    with_short_wait.close()


def test_the_number_of_calls_under_way_is_bounded(fake, sandbox):
    calls = [sandbox.submit("import time; time.sleep(0.2)") for _ in range(12)]
    assert {c.result().status for c in calls} == {"ok"}
    assert fake.most <= 4


def test_a_server_that_turns_silent_is_not_believed(fake, sandbox):
    sandbox.suspicion = 3
    fake.mode = "silent"
    found = [call.result().status for call in [sandbox.submit("print(1)") for _ in range(8)]]
    assert found == ["infrastructure"] * 8  # not even the first is passed on


def canaries(fake, program: str) -> int:
    return sum(body["code"] != program for _, body in fake.requests)


def test_programs_that_do_run_out_of_time_stay_their_own_fault(fake, sandbox, monkeypatch):
    program = "import time; time.sleep(9)"
    sandbox.suspicion, sandbox.timeout_s = 2, 0.5

    def statuses(number: int) -> list[str]:
        fake.requests.clear()
        return [sandbox.submit(program).result().status for _ in range(number)]

    assert statuses(4) == ["time_limit"] * 4
    assert canaries(fake, program) == 2  # before the first, which vouches for two more, and before the fourth
    monkeypatch.setattr(sandbox_fusion, "PROVEN_S", 0.0)
    assert statuses(2) == ["time_limit"] * 2 and canaries(fake, program) == 2


def test_a_server_that_turns_silent_after_a_proof_is_believed_for_a_moment_only(fake, sandbox, monkeypatch):
    monkeypatch.setattr(sandbox_fusion, "PROVEN_S", 0.2)
    sandbox.timeout_s = 0.5
    assert sandbox.submit("import time; time.sleep(9)").result().status == "time_limit"
    fake.mode = "silent"
    time.sleep(0.3)
    assert sandbox.submit("print(1)").result().status == "infrastructure"


def test_one_canary_answers_for_all_who_wait(fake, sandbox):
    program = "import time; time.sleep(9)"
    sandbox.timeout_s, sandbox.suspicion = 0.5, 1
    fake.requests.clear()
    with sandbox._canary:  # as if a canary were under way
        calls = [sandbox.submit(program) for _ in range(4)]
        time.sleep(1.5)
    assert [call.result().status for call in calls] == ["time_limit"] * 4
    assert canaries(fake, program) == 1


def test_close_does_not_work_through_the_queue(fake):
    sandbox = SandboxFusion(url=fake.url, concurrency=2, timeout_s=2.0, retries=4, backoff_s=20.0)
    sandbox.start()
    fake.mode = "http_500"  # two calls wait for their repetition, the others for those
    calls = [sandbox.submit("print(1)") for _ in range(12)]
    time.sleep(0.3)
    start = time.monotonic()
    sandbox.close()
    assert time.monotonic() - start < 2
    assert [call.result(0).status for call in calls] == ["infrastructure"] * 12
    assert len(fake.requests) <= 1 + 6  # the canary, and what had gone out; nothing new
    fake.mode = ""  # and may be started again
    assert sandbox.submit("print(2)").result().stdout == "2\n"
    sandbox.close()


def test_half_a_surrogate_pair_does_not_break_the_connection(sandbox):
    assert sandbox.submit("x = '\ud800'; print(2)").result().status in {"ok", "error"}
    assert sandbox.submit("print(3)").result().stdout == "3\n"


def one_line(error: pytest.ExceptionInfo) -> str:
    text = str(error.value)
    assert "\n" not in text
    return text


def test_no_url():
    with pytest.raises(UserError) as error:
        SandboxFusion()
    assert "sandbox.url" in one_line(error) and "docker run" in one_line(error)


def test_a_dead_port():
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    start = time.monotonic()
    with pytest.raises(UserError) as error:
        SandboxFusion(url=f"http://127.0.0.1:{port}").start()
    assert f"sandbox.url=http://127.0.0.1:{port}" in one_line(error) and "8080" in one_line(error)
    assert time.monotonic() - start < 5


@pytest.mark.parametrize("mode", ["silent", "http_500", "no_json"])
def test_a_broken_server_is_refused_at_the_start(fake, mode):
    fake.mode = mode
    with pytest.raises(UserError, match=r"sandbox\.url"):
        SandboxFusion(url=fake.url).start()


def test_arguments_out_of_range():
    with pytest.raises(UserError, match=r"sandbox\.concurrency"):
        SandboxFusion(url="http://localhost:1", concurrency=0)
