"""What the benches have in common: rows by pattern, and one folder for one set of settings."""

from __future__ import annotations

import fnmatch
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from thintune.errors import ConfigError, nearest
from thintune.io import read_document, write_text


def matching(patterns: str, names: Sequence[str]) -> set[str]:
    """The names that one of the patterns matches.

    Args:
        patterns: shell patterns with commas between.
        names: of all rows.

    Raises:
        ConfigError: a pattern that matches no row, or none given.
    """
    wanted = [word.strip() for word in patterns.split(",") if word.strip()]
    for word in wanted:
        if not fnmatch.filter(names, word):
            raise ConfigError(f"rows: no row is named {word!r}; --list prints them.{nearest(word, names)}")
    if not wanted:
        raise ConfigError("rows: expected the name of a row or a shell pattern, got nothing.")
    return {name for name in names if any(fnmatch.fnmatchcase(name, word) for word in wanted)}


def keep_settings(out: Path, mine: Mapping[str, Any], may_change: Sequence[str]) -> None:
    """Writes `bench.json`; the cells beside it must have been measured with the same settings.

    Args:
        out: folder of the bench.
        mine: JSON values.
        may_change: names of settings that no cell depends on.

    Raises:
        ConfigError: another value of any other setting.
    """
    path = out / "bench.json"
    if path.exists():
        theirs = read_document(path)
        changed = [name for name in mine if name not in may_change and mine[name] != theirs.get(name)]
        if changed:
            said = "; ".join(f"{name} is {theirs.get(name)}, not {mine[name]}" for name in changed)
            raise ConfigError(f"{out}: holds a bench of other settings: {said}; use another --out.")
    write_text(path, json.dumps(mine, indent=2) + "\n")
