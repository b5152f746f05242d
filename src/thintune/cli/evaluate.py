"""`thintune eval`."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

from thintune.cli.parser import eval_parser


def run(words: Sequence[str]) -> int:
    """Loads a checkpoint, measures it on its test split, prints the result; returns the exit code."""
    parsed = eval_parser().parse_args(list(words))
    from thintune.train.reload import evaluate_checkpoint

    changes = {"root": parsed["data.root"], "test_limit": parsed["data.test_limit"]}
    changes = {key: value for key, value in changes.items() if value is not None}
    result = evaluate_checkpoint(Path(parsed["checkpoint"]), parsed["device"], changes, parsed["threads"])
    if parsed["json"]:
        print(json.dumps(dataclasses.asdict(result)))
    else:
        print(
            f"test accuracy {result.accuracy:.4f} on {result.images} images, {result.images_per_s:.0f} images/s, "
            f"checkpoint {result.checkpoint_bytes / 1e6:.2f} MB"
        )
    return 0
