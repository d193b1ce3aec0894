"""dbcap: caption, prepare, train, generate and export personal image models."""

__version__ = "0.1.0"
