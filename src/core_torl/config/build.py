"""From a config node with ``_target_`` to an object: the one place that calls Hydra's ``instantiate``."""

from __future__ import annotations

import importlib
import inspect
from typing import Any

from core_torl.config.errors import UserError, causes

# Hydra 1.4 instantiates nothing that is not named; users add their own packages with the key `trusted_targets`.
_TRUSTED = ("core_torl.*", "torch.optim.*", "pytorch_lightning.*")
_extra: list[str] = []


def trust(targets: list[str]) -> None:
    """Let ``_target_`` name these packages too (patterns such as ``my_package.*``)."""
    _extra[:] = targets


def _trusted(node: Any) -> str:
    target = str(node["_target_"])
    if not any(target.startswith(p.removesuffix("*")) for p in (*_TRUSTED, *_extra)):
        raise UserError(f"_target_ {target!r} is not trusted: add '{target.rsplit('.', 1)[0]}.*' to trusted_targets")
    return target


def class_of(node: Any) -> Any:
    """The class that ``node`` names, not built. Raises UserError if it is not trusted or does not exist."""
    target = _trusted(node)
    module, _, name = target.rpartition(".")
    try:  # Hydra's own get_class prints several lines before it raises
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(f"_target_ {target!r}: {str(error).splitlines()[0]}") from error


def build(node: Any, *args: Any, **kwargs: Any) -> Any:
    """Instantiate ``node``. ``args`` and ``kwargs`` are what a config cannot hold: models, samplers, problems.

    Raises UserError, on one line, if the constructor refuses a value or does not know a key.
    """
    from hydra.errors import InstantiationException
    from hydra.utils import instantiate

    target = _trusted(node)
    guard: dict[str, Any] = {}
    if "_execution_whitelist_" in inspect.signature(instantiate).parameters:
        guard["_execution_whitelist_"] = [*_TRUSTED, *_extra]
    try:
        # Only the config goes through Hydra, which would turn runtime arguments into config nodes.
        make = instantiate(node, _partial_=True, _convert_="all", **guard)
        return make(*args, **kwargs)
    except UserError:
        raise
    except InstantiationException as error:
        # A part inside this one was refused: what its constructor said names the key.
        own = [e for e in causes(error) if isinstance(e, ValueError | FileNotFoundError)]
        text = str(own[-1]) if own else f"_target_ {target!r}: {str(error).splitlines()[0]}"
        raise UserError(text) from error
    except (ValueError, FileNotFoundError) as error:
        # A constructor's own complaint names the key.
        raise UserError(str(error)) from error
    except TypeError as error:
        if "unexpected keyword" not in str(error):
            raise
        raise UserError(f"{target}: {error}") from error
