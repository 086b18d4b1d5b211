"""The process inside a sandbox that forks one child per program, and cleans up after it.

It has sympy and numpy loaded, so that a program that imports them starts in milliseconds. It never runs a program's
code itself: a program lives in a forked child (and in what that child starts), which cannot write to this process.
Standard library only, apart from the two packages that are loaded for the programs.

For each program: fork; a file system of its own for scratch; limits; locks (``lockdown.py``); run. When the child has
ended, or a limit is reached, every process that the program left is killed and collected, whether or not it went into
a session of its own. With a pid namespace one ``kill(-1)`` does that: the kernel refuses forks to a process that a
signal is pending for, so nothing slips away. Without one, orphans come to this process as their subreaper.

What a program cannot do to this process: signal it (it is the namespace's init, for which the kernel drops signals, or
Landlock and seccomp forbid it), trace it or open its /proc files (it has capabilities that a program lacks), write to
its pipes (closed in the child), fill its memory (output is read up to a limit). So a program cannot end its worker, and
a worker that dies was ended from outside.

Messages on the pipes, lengths in network order: in, ``!I`` and the source; out, ``!I`` and a JSON head, then the
bytes of stdout and stderr, whose lengths the head gives. The first message out says what isolation there is.
"""

from __future__ import annotations

import _signal  # pyright: ignore[reportMissingImports]
import gc
import json
import math
import mmap
import os
import resource
import select
import shutil
import signal
import struct
import sys
import time
from contextlib import suppress
from typing import Any, NoReturn

from core_torl.sandbox import lockdown, preload, program

TICK_S = 0.05  # how often the memory of a program with several processes is summed up
DRAIN_S = 2.0  # for output that is still in the pipes when every process is gone
READ_BYTES = 1 << 16


def read_exactly(fd: int, size: int) -> bytes:
    """``size`` bytes. Raises EOFError."""
    parts = []
    while size:
        part = os.read(fd, min(size, 1 << 20))
        if not part:
            raise EOFError
        parts.append(part)
        size -= len(part)
    return b"".join(parts)


def write_all(fd: int, data: bytes) -> None:
    """Raises OSError."""
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]


class Server:
    """``limits`` as in ``Limits``; ``place`` says where this process is: see the launchers for its keys."""

    def __init__(self, limits: dict[str, Any], place: dict[str, Any], requests: int) -> None:
        self.limits, self.place, self.requests = limits, place, requests
        self.scratch: str = place["scratch"]
        self.namespaces: bool = place["namespaces"]  # pid and mount namespaces of our own, with the right to mount
        self.job_id: int | None = place["job_id"]  # an id for programs other than our own
        self.abi = lockdown.landlock_abi() if place["locks"] else 0
        self.null = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
        self.locks = place["locks"]
        # Made ahead of time where they are the same for every program: a child pays for each page that it touches.
        self.block = lockdown.seccomp_filter(True) if self.locks and self.namespaces else None
        # Shared with the child, to say what ended it. Not a descriptor, so no program comes upon it by accident; one
        # that looks for it gains no more than by raising MemoryError.
        self.note = mmap.mmap(-1, 1)
        self.hidden = [name for name in sys.modules if name.split(".", 1)[0] == "core_torl"]

    def describe(self) -> dict[str, Any]:
        seccomp = self.locks and lockdown.seccomp_filter(True) is not None
        return {"namespaces": self.namespaces, "landlock": self.abi, "seccomp": seccomp, "job_id": self.job_id}

    # In the child.

    def _child(self, source: bytes, out: int, err: int, locked: int) -> NoReturn:
        try:
            os.setsid()
            for fd, wanted in ((self.null, 0), (out, 1), (err, 2)):
                os.dup2(fd, wanted)
            if locked != 3:
                os.dup2(locked, 3)
            os.closerange(4, 1 << 16)
            self._lock()
            # Said on a pipe that is closed before the program begins, so no program can unsay it.
            os.write(3, b"+")
            os.close(3)
        except (OSError, ValueError) as error:
            os.write(2, f"{type(error).__name__}: {error}".encode())
            os._exit(1)
        try:
            program.run(source, self.hidden, self.note)
        finally:  # never back into the server's code, whatever a program does to ``run``
            os._exit(1)

    def _lock(self) -> None:
        """Scratch, limits, locks, in an order in which each step is still allowed."""
        limits, megabyte = self.limits, 1 << 20
        if self.namespaces:
            lockdown.unshare(lockdown.CLONE_NEWNS)
            options = f"size={limits['scratch_mb']}m,nr_inodes={limits['scratch_mb'] * 64},mode=1777"
            flags = lockdown.MS_NOSUID | lockdown.MS_NODEV
            lockdown.mount("tmpfs", self.scratch, "tmpfs", flags, options)
            lockdown.mount(self.scratch, "/dev/shm", None, lockdown.MS_BIND)
        os.chdir(self.scratch)
        os.umask(0o022)
        # The soft CPU limit ends a program with SIGXCPU; the hard one, a second later, those that ignore it.
        cpu = math.ceil(limits["cpu_s"])
        for what, most in (
            (resource.RLIMIT_AS, limits["memory_mb"] * megabyte),
            (resource.RLIMIT_FSIZE, limits["file_mb"] * megabyte),
            (resource.RLIMIT_NPROC, limits["processes"]),
            (resource.RLIMIT_NOFILE, 256),
            (resource.RLIMIT_CORE, 0),
            (resource.RLIMIT_MSGQUEUE, 0),
        ):
            resource.setrlimit(what, (most, most))
        resource.setrlimit(resource.RLIMIT_CPU, (cpu, cpu + 1))
        if self.job_id is not None:
            os.setgroups([])
            os.setresgid(self.job_id, self.job_id, self.job_id)
            os.setresuid(self.job_id, self.job_id, self.job_id)
        lockdown.drop_capabilities()
        lockdown.prctl(lockdown.PR_SET_DUMPABLE, 1)  # a program may look into its own /proc/self
        if self.abi:
            writable = [self.scratch, "/dev/shm"] if self.namespaces else [self.scratch]
            devices = ["/dev/null", "/dev/zero", "/dev/full"]
            lockdown.landlock(self.abi, self.place["readable"], [*writable, *devices])
        if self.locks:
            block = self.block or lockdown.seccomp_filter(self.namespaces)
            if block is not None:
                lockdown.seccomp(block)
        _signal.signal(_signal.SIGINT, _signal.default_int_handler)  # as CPython has it

    # In the server.

    def run(self, source: bytes) -> tuple[dict[str, Any], bytes, bytes]:
        """Run one program to its end. Never raises for what the program does."""
        if not self.namespaces:
            self._clear_scratch()
        (out_read, out_write), (err_read, err_write), (locked_read, locked_write) = (
            os.pipe2(os.O_CLOEXEC) for _ in range(3)
        )
        # A program may open its own pipe for reading and take away what ``poll`` has announced.
        for fd in (out_read, err_read):
            os.set_blocking(fd, False)
        self.note[0] = 0
        start = time.monotonic()
        pid = os.fork()
        if pid == 0:
            self._child(source, out_write, err_write, locked_write)
        for fd in (out_write, err_write, locked_write):
            os.close(fd)
        watch = os.pidfd_open(pid)
        try:
            texts = {out_read: bytearray(), err_read: bytearray()}
            verdict = self._watch(start, watch, texts)
            # The process is a zombie at the latest now: its id cannot be taken by another.
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
            _, state, usage = os.wait4(pid, 0)
            seconds = time.monotonic() - start
            self._sweep(pid)
            verdict = self._drain(texts) or verdict
            locked = os.read(locked_read, 1) == b"+"
        finally:
            for fd in (watch, out_read, err_read, locked_read):
                os.close(fd)
        most = self.limits["output_bytes"]
        out = bytes(texts[out_read][:most])
        err = bytes(texts[err_read][: most - len(out)])
        if locked:
            head, err = self._verdict(verdict, state, usage, err)
        else:
            head = {"status": "infrastructure", "detail": f"the locks failed: {err.decode(errors='replace')}"}
            out = err = b""
        if not self.namespaces:
            self._clear_scratch()
        return {**head, "seconds": seconds, "out": len(out), "err": len(err)}, out, err

    def _watch(self, start: float, watch: int, texts: dict[int, bytearray]) -> str | None:
        """Read output until the program's first process has ended; or the limit that was reached."""
        deadline = start + self.limits["timeout_s"]
        poll = select.poll()
        for fd in (watch, self.requests, *texts):
            poll.register(fd, select.POLLIN)
        next_tick = start + TICK_S
        while True:
            now = time.monotonic()
            if now >= deadline:
                return "time_limit"
            if now >= next_tick:
                next_tick = now + TICK_S
                if self._resident() > self.limits["memory_mb"] << 20:
                    return "memory_limit"
            ended = False
            for fd, _ in poll.poll(max(0.0, min(deadline, next_tick) - now) * 1000 + 1):
                if fd == watch:
                    ended = True
                elif fd == self.requests:  # nobody sends while a program runs: the other side is gone
                    self._sweep(0)
                    os._exit(0)
                elif not self._read(fd, texts):
                    poll.unregister(fd)
            if sum(map(len, texts.values())) > self.limits["output_bytes"]:
                return "output_limit"
            if ended:
                return None

    def _read(self, fd: int, texts: dict[int, bytearray]) -> bool:
        """False at the end of the output."""
        try:
            block = os.read(fd, READ_BYTES)
        except BlockingIOError:  # the program itself has read it
            return True
        texts[fd] += block
        return bool(block)

    def _drain(self, texts: dict[int, bytearray]) -> str | None:
        """What is left in the pipes; their other ends are closed, for every process is gone."""
        deadline = time.monotonic() + DRAIN_S
        for fd in texts:
            while select.select([fd], [], [], 0)[0] and self._read(fd, texts):
                if sum(map(len, texts.values())) > self.limits["output_bytes"] or time.monotonic() > deadline:
                    return "output_limit"
        return None

    def _others(self) -> list[int]:
        """Every process but this one: all that the pid namespace shows, else our descendants."""
        pids = [int(name) for name in os.listdir("/proc") if name.isdigit()] if os.path.isdir("/proc/self") else []
        if self.namespaces:
            return [pid for pid in pids if pid != os.getpid()]
        parents = {}
        for pid in pids:
            with suppress(OSError, ValueError, IndexError), open(f"/proc/{pid}/stat", "rb") as file:
                parents[pid] = int(file.read().rpartition(b")")[2].split()[1])
        known = {os.getpid()}
        while True:
            more = {pid for pid, parent in parents.items() if parent in known} - known
            if not more:
                return sorted(known - {os.getpid()})
            known |= more

    def _resident(self) -> int:
        """Bytes of memory that the program's processes hold beyond what each inherited from this one.

        Memory that they share counts in each process that has touched it.
        """

        def held(pid: int) -> int:
            try:
                with open(f"/proc/{pid}/status", "rb") as file:
                    lines = file.read().splitlines()
            except (FileNotFoundError, ProcessLookupError, PermissionError):  # it ended meanwhile
                return 0
            return sum(int(line.split()[1]) << 10 for line in lines if line.startswith((b"RssAnon:", b"RssShmem:")))

        own = held(os.getpid())
        return sum(max(0, held(pid) - own) for pid in self._others())

    def _sweep(self, leader: int) -> None:
        """Kill and collect every process that the program left behind."""
        while True:
            if self.namespaces:
                with suppress(ProcessLookupError):
                    os.kill(-1, signal.SIGKILL)
            else:
                if leader:
                    with suppress(ProcessLookupError, PermissionError):
                        os.killpg(leader, signal.SIGKILL)
                for pid in self._others():
                    with suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)
            try:
                while os.waitpid(-1, os.WNOHANG)[0]:
                    pass
            except ChildProcessError:
                return
            time.sleep(0.0005)

    def _clear_scratch(self) -> None:
        """Empty the scratch folder where it is a plain folder. What cannot be deleted ends the worker."""

        def open_up(function: Any, path: str, error: Any) -> None:
            os.chmod(os.path.dirname(path), 0o700)
            os.chmod(path, 0o700)
            if os.path.isdir(path):
                shutil.rmtree(path)
            else:
                os.unlink(path)

        for name in os.listdir(self.scratch):
            path = os.path.join(self.scratch, name)
            if os.path.isdir(path) and not os.path.islink(path):
                shutil.rmtree(path, onerror=open_up)
            else:
                os.unlink(path)

    def _verdict(self, limit: str | None, state: int, usage: Any, err: bytes) -> tuple[dict[str, Any], bytes]:
        """The status of a program, and its stderr with a last line that names the signal, if one ended it."""
        limits, cpu_s = self.limits, usage.ru_utime + usage.ru_stime
        if limit == "time_limit":
            return {"status": limit, "detail": f"more than {limits['timeout_s']:g} s on the clock"}, err
        if limit == "memory_limit":
            return {"status": limit, "detail": f"more than {limits['memory_mb']} MiB in all processes"}, err
        if limit == "output_limit":
            return {"status": limit, "detail": f"more than {limits['output_bytes']} bytes of output"}, err
        if os.WIFEXITED(state):
            code = os.WEXITSTATUS(state)
            if code and self.note[0] == program.STARVED:
                return {"status": "memory_limit", "detail": f"more than {limits['memory_mb']} MiB of memory"}, err
            return {"status": "ok" if code == 0 else "error", "detail": f"exit status {code}" if code else ""}, err
        number = os.WTERMSIG(state)
        name = f"{signal.strsignal(number)} ({signal.Signals(number).name})" if number < 32 else f"signal {number}"
        if number == signal.SIGXCPU or (number == signal.SIGKILL and cpu_s >= limits["cpu_s"]):
            return {"status": "time_limit", "detail": f"more than {limits['cpu_s']:g} s of CPU time"}, err
        ends_the_starved = (signal.SIGKILL, signal.SIGSEGV, signal.SIGABRT, signal.SIGBUS)
        if number in ends_the_starved and usage.ru_maxrss * 1024 > limits["memory_mb"] << 19:
            return {"status": "memory_limit", "detail": f"{name} near {limits['memory_mb']} MiB of memory"}, err
        return {"status": "error", "detail": name}, err + (b"\n" if err and not err.endswith(b"\n") else b"") + (
            f"{name}\n".encode()
        )


def main(argument: str) -> NoReturn:
    """Serve until the pipe is closed. ``argument``: JSON with ``limits`` and ``place``."""
    settings = json.loads(argument)
    place = settings["place"]
    # The protocol gets descriptors of its own: what a library prints must not be read as an answer.
    requests, answers = os.dup(0), os.dup(1)
    for fd in (requests, answers):
        os.set_inheritable(fd, False)
    null = os.open(os.devnull, os.O_RDWR)
    for fd in (0, 1):
        os.dup2(null, fd)
    os.close(null)
    lockdown.prctl(lockdown.PR_SET_PDEATHSIG, signal.SIGKILL)
    if place["enclose"]:
        from core_torl.sandbox import namespaces

        namespaces.enclose(place)
    sys.path[:] = [p for p in sys.path if p != place["code"]]
    sys.path.insert(0, place["packages"])
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # init is immune to signals that it does not handle
    lockdown.prctl(lockdown.PR_SET_CHILD_SUBREAPER, 1)
    preload.warm()
    lockdown.prctl(lockdown.PR_SET_DUMPABLE, 0)  # hides /proc/<this>/* from programs
    server = Server(settings["limits"], place, requests)
    gc.collect()
    gc.disable()
    gc.freeze()  # a collection in a child would touch, and so copy, every page
    hello = json.dumps(server.describe()).encode()
    write_all(answers, struct.pack("!I", len(hello)) + hello)
    while True:
        try:
            (size,) = struct.unpack("!I", read_exactly(requests, 4))
            source = read_exactly(requests, size)
        except EOFError:
            os._exit(0)
        head, out, err = server.run(source)
        encoded = json.dumps(head).encode()
        write_all(answers, struct.pack("!I", len(encoded)) + encoded + out + err)
        preload.reseed()
