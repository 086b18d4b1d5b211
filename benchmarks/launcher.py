"""What a job of a sweep costs beside its own work: 200 jobs that do nothing, each a process of its own.

Compared with the same command given by hand, one after the other: the launcher may add little to the start of Python,
and must give back what it takes. Prints the time for each job, the ratio to that of a command by hand, the memory of
the launcher itself, and what is left when it has ended: zombies, open files, processes. Hydra's basic launcher, which
starts no process at all and keeps nothing apart, stands beside as the lower bound. ``--training`` measures the other
end: short training runs, forked from one process that has imported torch (``prefork``) against started anew.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

APP = Path(__file__).parents[1] / "tests" / "launch" / "noop" / "app.py"


def children(pid: int) -> dict[int, str]:
    """Child processes and their state letter; Z is one that has ended and was not reaped."""
    found = {}
    for path in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in path.read_text().split():
            try:
                found[int(child)] = Path(f"/proc/{child}/stat").read_text().rpartition(")")[2].split()[0]
            except OSError:  # reaped in between
                continue
    return found


def status(pid: int, key: str) -> int:
    """A number of /proc/PID/status, in KiB where it is memory."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{key}:"))


def by_hand(folder: Path, seed: int) -> float:
    began = time.perf_counter()
    subprocess.run([sys.executable, str(APP), f"seed={seed}", f"hydra.run.dir={folder / str(seed)}"],
                   check=True, capture_output=True)  # fmt: skip
    return time.perf_counter() - began


def sweep(folder: Path, jobs: int, *options: str) -> dict[str, float]:
    """Run the sweep and watch its launcher. Seconds in all, peak KiB, and the most files, zombies and children seen."""
    began = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, str(APP), "-m", f"seed=range({jobs})", f"hydra.sweep.dir={folder}", *options],
        stdout=subprocess.DEVNULL, stderr=subprocess.STDOUT,
    )  # fmt: skip
    seen = {"peak": 0, "files": 0, "zombies": 0, "children": 0}
    files = []
    while process.poll() is None:
        try:
            states = children(process.pid)
            files.append(len(list(Path(f"/proc/{process.pid}/fd").iterdir())))
            seen["peak"] = max(seen["peak"], status(process.pid, "VmHWM"))
            # A job that has just ended is a zombie until the launcher looks, twenty times a second.
            seen["zombies"] = max(seen["zombies"], sum(state == "Z" for state in states.values()))
            seen["children"] = max(seen["children"], len(states))
        except (OSError, StopIteration):  # it has ended in between
            break
        time.sleep(0.1)
    assert process.wait() == 0
    third = max(1, len(files) // 3)
    return seen | {
        "wall": time.perf_counter() - began, "files": max(files),
        # Whether the number of open files grows with the jobs: the last third of the sweep against the first.
        "grown": statistics.median(files[-third:-1] or files) - statistics.median(files[third : 2 * third] or files),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--jobs", type=int, default=200)
    parser.add_argument("--n-jobs", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5, help="commands by hand before, and as many after")
    parser.add_argument("--training", type=int, default=0, metavar="JOBS", help="short training runs instead")
    args = parser.parse_args()
    if args.training:
        return training(args.training)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        times = [by_hand(folder / "before", i) for i in range(args.rounds)]
        anew = sweep(folder / "anew", args.jobs, f"hydra.launcher.n_jobs={args.n_jobs}", "hydra.launcher.view=false",
                     "hydra.launcher.prefork=false")  # fmt: skip
        ours = sweep(folder / "ours", args.jobs, f"hydra.launcher.n_jobs={args.n_jobs}", "hydra.launcher.view=false")
        times += [by_hand(folder / "after", i) for i in range(args.rounds)]
        basic = sweep(folder / "basic", args.jobs, "hydra/launcher=basic")
        began = time.perf_counter()
        again = sweep(folder / "ours", args.jobs, "hydra.launcher.view=false")
        skipped = time.perf_counter() - began
        board = json.loads((folder / "ours" / "sweep.json").read_text())
        assert [job["state"] for job in board["jobs"]] == ["skipped"] * args.jobs
        left = [p for p in Path("/proc").glob("[0-9]*/cmdline") if name.encode() in _bytes(p)]
    hand = statistics.median(times)
    each = ours["wall"] * args.n_jobs / args.jobs
    print(f"one command by hand: {hand:.2f} s (median of {len(times)})")
    print(f"subprocess launcher, {args.jobs} jobs, {args.n_jobs} at a time: {ours['wall']:.1f} s")
    print(f"  a job, on its core: {each:.2f} s, {each / hand:.2f} times the command by hand")
    print(f"  the same with prefork=false: {anew['wall']:.1f} s, {anew['wall'] / ours['wall']:.2f} times as long")
    print(f"  memory of the launcher at its peak: {ours['peak'] / 1024:.0f} MiB")
    print(f"  open files at most {ours['files']:.0f}, more in the last third than in the middle: {ours['grown']:.0f}")
    print(f"  zombies at most {ours['zombies']:.0f} at one moment; processes left at the end: {len(left)}")
    print(f"basic launcher (one process for all): {basic['wall']:.1f} s, peak {basic['peak'] / 1024:.0f} MiB")
    print(f"the same command again, nothing to do: {skipped:.1f} s, {1000 * skipped / args.jobs:.0f} ms a job, peak "
          f"{again['peak'] / 1024:.0f} MiB")  # fmt: skip


def training(jobs: int) -> None:
    """CPU seconds of all processes of a sweep of runs of one RL step, alternating: forked, anew, forked, anew."""
    spent: dict[str, list[float]] = {"true": [], "false": []}
    with tempfile.TemporaryDirectory() as name:
        for turn in range(2):
            for prefork in spent:
                before = resource.getrusage(resource.RUSAGE_CHILDREN)
                subprocess.run(
                    [sys.executable, "-m", "core_torl.train", "-m", f"seed=range({jobs})", "debug=limit", "rl_steps=1",
                     "export=false", f"hydra.launcher.prefork={prefork}", "hydra.launcher.view=false",
                     f"hydra.sweep.dir={name}/{prefork}{turn}"], check=True, capture_output=True,
                )  # fmt: skip
                after = resource.getrusage(resource.RUSAGE_CHILDREN)
                spent[prefork].append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    forked, anew = (statistics.median(spent[key]) for key in ("true", "false"))
    print(f"{jobs} training runs of one RL step: {forked:.1f} s of a core forked, {anew:.1f} s started anew, "
          f"{anew / forked:.2f} times as much")  # fmt: skip


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:
        return b""


if __name__ == "__main__":
    main()
