"""The command line: `thintune train` and `thintune eval`."""

from thintune.cli.main import main

__all__ = ["main"]
