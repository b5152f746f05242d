"""Libraries that only some sources need."""

from __future__ import annotations

import importlib
from types import ModuleType

from thintune.errors import MissingDependencyError


def require(module: str, where: str) -> ModuleType:
    """Imports a library of the `vision` extra.

    Args:
        module: full name, as `sklearn.datasets`.
        where: the setting that needs it, for the message.

    Raises:
        MissingDependencyError: it, or a library that it needs, is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise missing(where, error) from error


def missing(where: str, error: ImportError) -> MissingDependencyError:
    """Names the absent library and the extra that brings it."""
    library = (error.name or str(error)).split(".")[0]
    return MissingDependencyError(f"{where}: needs {library}, which is not installed; pip install 'thintune[vision]'.")
