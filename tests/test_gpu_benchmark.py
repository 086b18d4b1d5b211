"""The benchmark for GPUs runs from end to end where there is none, says so, and writes no figures."""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture
def benchmark(monkeypatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return import_module("gpu")


def run(benchmark, monkeypatch, capsys, *arguments: str) -> str:
    monkeypatch.setattr(sys, "argv", ["gpu.py", *arguments])
    benchmark.main()
    return capsys.readouterr().out


def test_every_part_runs_on_a_cpu_and_nothing_is_written(benchmark, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(benchmark, "ROOT", tmp_path)
    out = run(benchmark, monkeypatch, capsys, "--tiny", "--device", "cpu")
    assert "these are no figures of a GPU" in out and not list(tmp_path.iterdir())
    for part in (
        "rollout embedded tokens_per_s",
        "training tokens_per_s",
        "tools wait_share",
        "memory logprobs_ours_gib",
    ):
        assert part in out, part
    assert "training mfu" in out and "unknown" in out


def test_without_a_card_it_measures_nothing(benchmark, monkeypatch, capsys):
    monkeypatch.setattr(benchmark.torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="no CUDA card here, so nothing was measured"):
        run(benchmark, monkeypatch, capsys)
    with pytest.raises(SystemExit, match="--device cpu goes with --tiny only"):
        run(benchmark, monkeypatch, capsys, "--device", "cpu")


@pytest.mark.parametrize(
    ("card", "tera"),
    [
        ("NVIDIA H100 80GB HBM3", 989), ("NVIDIA H100 PCIe", 756), ("NVIDIA H200", 989), ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA L4", 121), ("NVIDIA L40S", 362), ("NVIDIA GeForce RTX 4090", 165), ("NVIDIA A10G", None), ("CPU", None),
    ],
)  # fmt: skip
def test_a_cards_peak_goes_by_its_whole_name(benchmark, card, tera):
    assert benchmark.peak_flops(card) == (tera * 1e12 if tera else None)


def test_the_flops_of_a_step_by_hand(benchmark):
    """One layer of width 4: 3 * 4 * 8 of the MLP, 4 * (4 + 2 + 2 + 4) of attention; the head on answers only."""
    model = benchmark.Architecture(layers=1, hidden=4, heads=2, kv_heads=1, mlp=8, vocabulary=10, tied=True)
    weights = 3 * 4 * 8 + 4 * (4 + 2 + 2 + 4) + 2 * 4  # and two norms
    expected = 6 * (2 * 5 * weights + 2 * 3 * 40 + 2 * 5 * 4 * 5)
    assert benchmark.needed_flops(model, rows=2, prompt=2, answer=3) == expected
