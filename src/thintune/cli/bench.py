"""`thintune bench`: which bench."""

from __future__ import annotations

from collections.abc import Sequence

from thintune.errors import ConfigError, nearest

_USAGE = """usage: thintune bench cost|frontier --out FOLDER [flags]

  cost      what an optimizer step takes: peak memory and time of every way to take the same step
  frontier  accuracy against memory and time: methods x settings x seeds, learning rates tuned

`thintune bench cost --help` and `thintune bench frontier --help` list the flags."""


def run(words: Sequence[str]) -> int:
    """Runs a bench; returns the exit code."""
    if not words or words[0] in ("-h", "--help"):
        print(_USAGE)
        return 0 if words else 2
    if words[0] == "cost":
        from thintune.cli.bench_cost import run as run_cost

        return run_cost(words[1:])
    if words[0] == "frontier":
        from thintune.cli.bench_frontier import run as run_frontier

        return run_frontier(words[1:])
    known = ["cost", "frontier"]
    raise ConfigError(f"bench {words[0]}: unknown bench, expected cost or frontier.{nearest(words[0], known)}")
