"""The version, in one place for the code; `pyproject.toml` repeats it for package indexes."""

__version__ = "0.1.0"
