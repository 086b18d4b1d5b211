"""Taking vLLM, which is optional, into the trainer's process without leaving traces there.

Importing vLLM and starting an engine change much that belongs to the trainer: the environment that its child processes
inherit (LD_PRELOAD, LD_LIBRARY_PATH, compiler settings), every global random generator, ``torch.set_num_threads``, and
torch's default process group, which Lightning would take for its own. ``undisturbed`` puts all of it back.

``check_vllm`` says in one line what is missing. It stands in core_torl.config.vllm_checks, because a config is checked
before anything heavy is imported, and is handed on from here.
"""

from __future__ import annotations

import gc
import os
import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any

import numpy as np
import torch

from core_torl.config.errors import UserError
from core_torl.config.vllm_checks import INSTALL_VLLM, TESTED_VLLM, check_vllm, vllm_version

__all__ = [
    "INSTALL_VLLM", "TESTED_VLLM", "check_vllm", "import_vllm", "part", "same_draws", "undisturbed", "vllm_version",
]  # fmt: skip

# Read by vLLM again and again while it works, so they stay set; they mean nothing to anything else.
_SETTINGS = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine in this process, where weights can be handed over as tensors
    "VLLM_USE_V2_MODEL_RUNNER": "0",  # the runner that was tested; vLLM chooses by device otherwise
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "CRITICAL",  # warns of modules without weights at each sync; errors are raised, too
}


def import_vllm() -> Any:
    """The module ``vllm``, set to keep its engine in this process.

    To be called within ``undisturbed``. Raises UserError where vLLM is missing, of an untested version, or set by the
    environment to run its engine in another process.
    """
    check_vllm()
    setting = os.environ.get("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    if setting != "0":
        raise UserError(
            f"VLLM_ENABLE_V1_MULTIPROCESSING={setting}: sampler=vllm keeps its engine in this process to hand weights "
            "over; unset it"
        )
    for name, value in _SETTINGS.items():
        os.environ.setdefault(name, value)
    vllm = part("")
    # At an engine's end vLLM destroys the process's default group, which by then is the trainer's.
    part("v1.engine.core").cleanup_dist_env_and_memory = _leave_groups_alone
    return vllm


def part(name: str) -> Any:
    """The module ``vllm.NAME``. vLLM is optional, so nothing imports it by a statement."""
    return import_module(f"vllm.{name}".rstrip("."))


def _leave_groups_alone(shutdown_ray: bool = False) -> None:
    """``undisturbed`` has taken down what an engine built; a group that is there now is not vLLM's."""


@contextmanager
def undisturbed() -> Iterator[None]:
    """Import vLLM or start an engine inside; afterwards the process is as before, but for settings named VLLM_*.

    A default process group that came up inside is taken down again: an engine on one device never uses it, and while it
    stands Lightning would train every rank by itself. One that stood before is kept.
    """
    environment = dict(os.environ)
    threads, set_threads, dtype = torch.get_num_threads(), torch.set_num_threads, torch.get_default_dtype()
    python, numpy_, hook = random.getstate(), np.random.get_state(), sys.excepthook
    had_group = torch.distributed.is_available() and torch.distributed.is_initialized()
    try:
        with _all_torch_generators():
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy_)
        torch.set_default_dtype(dtype)
        torch.set_num_threads = set_threads
        torch.set_num_threads(threads)
        if not had_group and torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
            sys.excepthook = hook  # the group's own puts the rank before each line of a traceback
        for name in set(os.environ) - set(environment):
            if not name.startswith("VLLM_"):
                del os.environ[name]
        os.environ.update({n: v for n, v in environment.items() if os.environ.get(n) != v})
        gc.unfreeze()  # an engine exempts all objects of the process from garbage collection


@contextmanager
def _all_torch_generators() -> Iterator[None]:
    cpu, cuda = torch.get_rng_state(), torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else None
    try:
        yield
    finally:
        torch.set_rng_state(cpu)
        if cuda is not None:
            torch.cuda.set_rng_state_all(cuda)


@contextmanager
def same_draws() -> Iterator[None]:
    """torch's CPU generator afterwards as before: vLLM's CPU sampler draws from it even where every row has its own."""
    state = torch.get_rng_state()
    try:
        yield
    finally:
        torch.set_rng_state(state)
