"""`thintune train`."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from thintune.cli.display import RichDisplay
from thintune.cli.parser import train_parser
from thintune.config import RunConfig, from_dict, to_dict
from thintune.errors import CheckpointError, ConfigError

_OWN = ("config", "out", "resume", "overwrite")


def run(words: Sequence[str]) -> int:
    """Parses the flags, trains, prints a summary; returns the exit code."""
    parser = train_parser()
    parsed = parser.parse_args(list(words)).as_dict()
    if not parsed["out"]:
        raise ConfigError("--out: expected a folder, got an empty name.")
    out = Path(parsed["out"])
    config = from_dict(_settings(parsed))
    resume = bool(parsed["resume"])
    if resume:
        config = _saved_config(out, _settings(parser.parse_args(list(words), defaults=False).as_dict()))
    from thintune.train.run import STATE, train

    display = RichDisplay()
    record = train(config, out, resume=resume, overwrite=bool(parsed["overwrite"]), display=display)
    if record.status == "interrupted":
        left = (out / STATE).is_dir()
        then = f"continue with: thintune train --resume --out {shlex.quote(str(out))}" if left else "no state was saved"
        print(f"thintune: interrupted after step {record.steps}; {then}", file=sys.stderr)
        return 130
    display.summary(record, out)
    return 0


def _settings(parsed: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in parsed.items() if key not in _OWN}


def _saved_config(out: Path, given: dict[str, Any]) -> RunConfig:
    """The settings of the run to resume; flags may repeat them, not change them."""
    from thintune.train.run import STATE
    from thintune.train.state import SavedState

    try:
        saved = SavedState(out / STATE).config
    except CheckpointError as error:
        raise CheckpointError(f"--resume: {error} Start the run without --resume.") from error
    asked, kept = _flat(given), _flat(to_dict(saved))
    changed = [f"{k} is {kept[k]!r}, not {v!r}" for k, v in asked.items() if v != kept[k]]
    if changed:
        raise ConfigError(f"--resume: the run in {out} has other settings: {'; '.join(changed)}.")
    return saved


def _flat(document: dict[str, Any]) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in document.items():
        if isinstance(value, dict) and key != "options":
            flat |= {f"{key}.{inner}": v for inner, v in _flat(value).items()}
        else:
            flat[key] = list(value) if isinstance(value, tuple) else value
    return flat
