"""Exceptions of the package.

Each child also subclasses the builtin it refines, so `except ValueError` keeps working. A message says where, what was
expected, what came and what to do. The command line turns every `ThintuneError` into one line and exit code 2.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class ThintuneError(Exception):
    """Root of every error that thintune raises on purpose."""


class ConfigError(ThintuneError, ValueError):
    """A configuration value or key that cannot be used."""


class DataError(ThintuneError, ValueError):
    """Data that is missing, unreadable or unfit for training."""


class CheckpointError(ThintuneError, ValueError):
    """A checkpoint that is missing, damaged or of another architecture."""


class ConversionError(ThintuneError, ValueError):
    """A model that cannot be converted as asked."""


class OutputError(ThintuneError, OSError):
    """A result that could not be written."""


class DivergenceError(ThintuneError, ArithmeticError):
    """A loss or gradient that is not finite."""


class MissingDependencyError(ThintuneError, ImportError):
    """An optional library that the asked feature needs."""


def nearest(word: str, known: Iterable[str]) -> str:
    """Returns `" Did you mean 'x'?"` for the closest known word, or an empty string."""
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f" Did you mean {close[0]!r}?" if close else ""
