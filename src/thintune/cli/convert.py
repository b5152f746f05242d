"""`thintune convert`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from thintune.cli.parser import Parser, _Formatter
from thintune.config import DataConfig, ModelConfig, ThinConfig, from_dict
from thintune.errors import ConfigError

HELP = """Convert dense weights to a thin checkpoint, for training or inference elsewhere.

The file of dense weights is read block by block and never held as a whole; the images of the data set, unlabelled,
decide which directions of each layer's output are kept."""


def convert_parser() -> Parser:
    """Parser of `thintune convert`."""
    parser = Parser(prog="thintune convert", description=HELP, formatter_class=_Formatter, allow_abbrev=False)
    parser.add_argument("--config", action="config", help="YAML file with any of the settings below; flags win.")
    parser.add_argument("--out", required=True, type=str, help="Folder of the thin checkpoint, made if need be.")
    parser.add_argument("--overwrite", action="store_true", help="Replace an earlier checkpoint in OUT.")
    parser.add_argument("--micro_batch", type=int, default=4, help="Images of one forward pass.")
    parser.add_argument("--threads", type=int, default=None, help="CPU threads; default: all.")
    parser.add_class_arguments(ModelConfig, "model", fail_untyped=True)
    parser.add_class_arguments(DataConfig, "data", fail_untyped=True)
    parser.add_class_arguments(ThinConfig, "thin", fail_untyped=True)
    return parser


def run(words: Sequence[str]) -> int:
    """Parses the flags, converts, prints what was done and what it took; returns the exit code."""
    parsed = convert_parser().parse_args(list(words)).as_dict()
    if not parsed["out"]:
        raise ConfigError("--out: expected a folder, got an empty name.")
    micro_batch = parsed["micro_batch"]
    if micro_batch < 1:
        raise ConfigError(f"--micro_batch: expected at least 1, got {micro_batch}.")
    config = from_dict(
        {
            "method": "thin",
            "train": {"batch_size": micro_batch, "micro_batch": micro_batch},
            **{name: parsed[name] for name in ("model", "data", "thin", "threads")},
        }
    )
    from thintune.train.conversion import convert_checkpoint

    out = Path(parsed["out"])
    result = convert_checkpoint(config, out, overwrite=bool(parsed["overwrite"]))
    print(result.report)
    print(f"{out}: thin checkpoint of {result.checkpoint_bytes / 1e6:.2f} MB")
    if result.peak_above_baseline_bytes is not None and result.data_bytes is not None:
        print(
            f"peak memory {result.peak_above_baseline_bytes / 1e6:.0f} MB above the imported libraries, "
            f"{result.data_bytes / 1e6:.0f} MB of it the data set; {result.calibration_images} calibration images"
        )
    if not result.streamed:
        whole = "downloads" if config.model.pretrained else "rewrites"
        print(f"not streamed: timm {whole} these weights as a whole, so the dense model was in memory")
    return 0
