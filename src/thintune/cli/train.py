"""`thintune train`."""

from __future__ import annotations

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
    parsed = train_parser().parse_args(list(words)).as_dict()
    out = Path(parsed["out"])
    config = from_dict({key: value for key, value in parsed.items() if key not in _OWN})
    resume = bool(parsed["resume"])
    if resume:
        config = _saved_config(out, config)
    from thintune.train.run import train

    display = RichDisplay()
    record = train(config, out, resume=resume, overwrite=bool(parsed["overwrite"]), display=display)
    if record.status == "interrupted":
        print(
            f"thintune: interrupted after step {record.steps}; continue with: thintune train --resume --out {out}",
            file=sys.stderr,
        )
        return 130
    display.summary(record, out)
    return 0


def _saved_config(out: Path, given: RunConfig) -> RunConfig:
    """The settings of the run to resume; flags may repeat them, not change them."""
    from thintune.train.run import STATE
    from thintune.train.state import SavedState

    try:
        saved = SavedState(out / STATE).config
    except CheckpointError as error:
        raise CheckpointError(f"--resume: {error} Start the run without --resume.") from error
    default = _flat(to_dict(RunConfig()))
    asked, kept = _flat(to_dict(given)), _flat(to_dict(saved))
    changed = [f"{k} is {kept[k]!r}, not {v!r}" for k, v in asked.items() if v not in (default[k], kept[k])]
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
