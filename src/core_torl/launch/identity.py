"""What makes two runs the same: everything in their config but where they write and what they show.

A sweep knows its jobs by this and not by the names of their folders, so that a job keeps its folder when another seed
is added in front of it, and is never mistaken for one with other settings.
"""

from __future__ import annotations

import copy
import hashlib
import json
from typing import Any

from omegaconf import DictConfig, OmegaConf, open_dict

# Groups and keys that say where a run writes, how it is watched and from where it goes on.
PLACES = ("paths", "logger", "callbacks", "resume", "reproduces")


def identity(cfg: DictConfig) -> str:
    """Sixteen hexadecimal digits for a composed config, the same for equal values however they were given.

    Interpolations are resolved; the run's own folder counts as one word wherever it is named. Raises omegaconf's
    errors for an interpolation that leads nowhere.
    """
    plain = copy.deepcopy(cfg)
    with open_dict(plain):
        if "output_dir" in (plain.get("paths") or {}):
            plain.paths.output_dir = "<this run>"
    tree: Any = OmegaConf.to_container(plain, resolve=True)
    kept = {key: value for key, value in tree.items() if key not in PLACES}
    return hashlib.sha256(json.dumps(kept, sort_keys=True, default=str).encode()).hexdigest()[:16]
