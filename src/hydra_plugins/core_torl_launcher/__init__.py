"""Where Hydra looks for launchers: classes defined in the namespace ``hydra_plugins``; core_torl does the work."""

from core_torl.launch import plugin


class SubprocessLauncher(plugin.SubprocessLauncher):
    """See ``core_torl.launch.plugin``."""
