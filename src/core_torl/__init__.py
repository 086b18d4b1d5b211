"""RL of mathematical reasoning with concepts (CORE) and tools (ToRL)."""

__version__ = "0.1.0"
