"""Configuration: where it lives, what may stand in it, how it becomes objects, and how its errors read.

Nothing in this package imports torch, so ``--help``, ``--cfg job`` and tab completion answer at once.
"""

from core_torl.config.build import build
from core_torl.config.errors import UserError
from core_torl.config.paths import conf_dir

__all__ = ["UserError", "build", "conf_dir"]
