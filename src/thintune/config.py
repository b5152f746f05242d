"""The configuration: one frozen dataclass a part.

The same classes give the command line's flags, the YAML file of `--config` and the `record.json` of a run; the
attribute docstrings are the help texts.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from thintune.errors import ConfigError, nearest
from thintune.peer_config import GaloreConfig, LoraConfig
from thintune.peer_config import require as _require

Precision = Literal["lean", "exact"]
Method = Literal["thin", "wasi", "wsi", "asi", "amc", "lora", "lora_fa", "svd_lora", "galore", "head", "dense"]
METHODS: tuple[Method, ...] = get_args(Method)
SOURCES = (
    "digits",
    "fashion-mnist",
    "cifar10",
    "cifar100",
    "flowers102",
    "pets",
    "food101",
    "folder",
    "synthetic",
)


def _require_share(name: str, value: float | None) -> None:
    _require(value is None or 0 < value <= 1, f"{name}: expected a number in (0, 1], got {value}.")


@dataclass(frozen=True)
class ThinConfig:
    """How linear layers become thin."""

    kept: float | None = None
    """Share of the converted layers' weights to keep, in (0, 1]; default for `thin` and `svd_lora`: 0.6."""
    explained_variance: float | None = None
    """Share of the variance each layer's rank must explain, in (0, 1]. Default for `wasi` and `wsi`: 0.9."""
    rank: int | None = None
    """The same rank for every layer; excludes kept and explained_variance."""
    include_modules: tuple[str, ...] = ()
    """Convert only linear layers whose name equals, lies under, or matches (shell pattern) one of these; empty: all."""
    exclude_modules: tuple[str, ...] = ()
    """Linear layers to leave dense, named in the same way; the classifier head is always left dense when training."""
    activation_rank: int = 32
    """`thin`: directions of each layer's input kept for the backward pass."""
    activation_explained_variance: float = 0.8
    """`asi`, `wasi`, `amc`: share of each mode's variance that the Tucker ranks must explain, in (0, 1]."""
    activation_budget_bytes: int | None = None
    """`asi` and `wasi`: choose the Tucker ranks by the perplexity table under this many bytes instead."""
    refresh_every: int = 25
    """`thin`: optimizer steps between two refreshes of the activation bases."""
    calibration_images: int = 256
    """Unlabelled training images of the calibration pass."""
    rank_allocation: Literal["variance", "sensitivity"] = "variance"
    """`thin` under kept: ranks of one explained variance, or of the least summed loss of the model's features."""
    output_weighting: Literal["none", "gradient"] = "none"
    """`thin`: gradient cuts factors in the norm of what each output feature is worth to the model's features."""
    reconstruction_steps: int = 0
    """`thin`: Adam steps that bring each converted block back to the output of the dense one, without labels."""
    update_scale: float = 1.0
    """`thin`: factor on every update of the thin layers; 1 keeps the dense learning rate."""
    factor_dtype: Literal["float32", "bfloat16"] = "float32"
    """`thin`: type in which the factors are stored; bfloat16 halves them, rounded stochastically at every step."""
    attention: Precision = "lean"
    """`thin`: lean recomputes q, k, v from the kept thin product (exact gradients); exact keeps what PyTorch keeps."""
    activation: Precision = "lean"
    """`thin`: lean recomputes the input of the GELU likewise (exact gradients); exact keeps what PyTorch keeps."""
    norm: Precision = "lean"
    """`thin`: lean keeps the normalised input in 8 bits (gradients to about 50 dB); exact keeps it whole."""

    def __post_init__(self) -> None:
        for name in ("kept", "explained_variance", "activation_explained_variance"):
            _require_share(f"thin.{name}", getattr(self, name))
        given = [n for n in ("kept", "explained_variance", "rank") if getattr(self, n) is not None]
        _require(
            len(given) <= 1, f"thin: expected one of kept, explained_variance and rank, got {' and '.join(given)}."
        )
        for name in ("rank", "activation_rank", "refresh_every", "calibration_images", "reconstruction_steps"):
            value, least = getattr(self, name), int(name != "reconstruction_steps")
            _require(value is None or value >= least, f"thin.{name}: expected at least {least}, got {value}.")
        _require(self.update_scale > 0, f"thin.update_scale: expected more than 0, got {self.update_scale}.")
        _require(
            self.activation_budget_bytes is None or self.activation_budget_bytes > 0,
            f"thin.activation_budget_bytes: expected more than 0, got {self.activation_budget_bytes}.",
        )
        for name in ("include_modules", "exclude_modules"):
            object.__setattr__(self, name, tuple(getattr(self, name)))


@dataclass(frozen=True)
class ModelConfig:
    """Which model is trained."""

    name: str = "timm:vit_small_patch14_dinov2"
    """Model as `timm:NAME`."""
    checkpoint: str | None = None
    """Safetensors file of dense weights in timm's names, but for the head; `thin`: or folder of a thin checkpoint."""
    pretrained: bool = False
    """Download the pre-trained weights of the name (needs internet)."""
    options: dict[str, Any] = field(default_factory=dict)
    """Further arguments of timm.create_model, as a JSON object: {"depth": 4}."""

    def __post_init__(self) -> None:
        _require(
            self.name.startswith("timm:") and len(self.name) > len("timm:"),
            f"model.name: expected 'timm:NAME', got {self.name!r}.",
        )
        _require(
            not (self.pretrained and self.checkpoint),
            "model: expected one of pretrained and checkpoint, got both.",
        )


@dataclass(frozen=True)
class DataConfig:
    """Which images are read and how they are split."""

    name: str = "digits"
    """One of digits, fashion-mnist, cifar10, cifar100, flowers102, pets, food101, folder, synthetic."""
    root: str | None = None
    """Folder of the data; `folder` reads ROOT/train/CLASS/* and ROOT/test/CLASS/*, or splits ROOT/CLASS/* itself."""
    image_size: int = 224
    """Height and width in pixels to which images are resized."""
    train_limit: int | None = None
    """Use this many training images, drawn once by split_seed."""
    test_limit: int | None = None
    """Use this many test images, drawn once by split_seed."""
    val_fraction: float = 0.1
    """Share of the official training images held out for validation, in [0, 0.5]."""
    val_limit: int = 1000
    """At most this many validation images."""
    split_seed: int = 0
    """Seed of the splits; the same for every seed of a run."""
    synthetic_images: int = 256
    """`synthetic`: images of the training split."""
    synthetic_classes: int = 10
    """`synthetic`: number of classes."""

    def __post_init__(self) -> None:
        _require(
            self.name in SOURCES,
            f"data.name: expected one of {', '.join(SOURCES)}, got {self.name!r}.{nearest(self.name, SOURCES)}",
        )
        _require(self.image_size >= 1, f"data.image_size: expected at least 1, got {self.image_size}.")
        _require(
            0 <= self.val_fraction <= 0.5, f"data.val_fraction: expected a number in [0, 0.5], got {self.val_fraction}."
        )
        for name in ("train_limit", "test_limit"):
            value = getattr(self, name)
            _require(value is None or value >= 1, f"data.{name}: expected at least 1, got {value}.")
        for name in ("val_limit", "synthetic_images"):
            _require(getattr(self, name) >= 1, f"data.{name}: expected at least 1, got {getattr(self, name)}.")
        _require(
            self.synthetic_classes >= 2, f"data.synthetic_classes: expected at least 2, got {self.synthetic_classes}."
        )


@dataclass(frozen=True)
class TrainConfig:
    """How the model is trained."""

    epochs: int = 3
    """Passes over the training images."""
    max_steps: int | None = None
    """Stop after this many optimizer steps; the schedule ends there too."""
    batch_size: int = 128
    """Images of an optimizer step."""
    micro_batch: int | None = None
    """Images of one forward and backward pass; gradients add up exactly to those of the batch. Default: the batch."""
    optimizer: Literal["adamw", "sgd"] = "adamw"
    """adamw, or sgd with momentum."""
    learning_rate: float = 3e-5
    """Peak learning rate."""
    momentum: float = 0.9
    """Momentum of sgd, in [0, 1)."""
    weight_decay: float = 0.01
    """Decay of weight matrices; decoupled for thin layers."""
    warmup_fraction: float = 0.1
    """Share of the steps over which the learning rate rises, in [0, 1)."""
    label_smoothing: float = 0.0
    """Label smoothing of the cross entropy, in [0, 1)."""
    clip_norm: float | None = 1.0
    """Largest gradient norm; null for none."""
    layerwise_update: bool = False
    """Least memory: update each layer as soon as its gradient is complete, free it at once; needs clip_norm null."""
    reuse_memory: bool = True
    """With layerwise_update: false hands freed memory back at once and generates no kernels: less memory, slower."""
    fit_head: bool = True
    """Fit a new head on the converted model's features before training."""
    checkpoint_every: int = 50
    """Steps between two resumable checkpoints; 0 for none."""
    evaluate_test: bool = True
    """Measure the test split at the end; false leaves it alone, as while choosing settings by validation accuracy."""
    track_subspaces: bool = False
    """Note ranks and principal angles of every layer's bases after each epoch, in OUT/subspaces.json."""
    seed: int = 0
    """Seed of weights, data order and dropout."""

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size"):
            _require(getattr(self, name) >= 1, f"train.{name}: expected at least 1, got {getattr(self, name)}.")
        for name in ("max_steps", "micro_batch"):
            value = getattr(self, name)
            _require(value is None or value >= 1, f"train.{name}: expected at least 1, got {value}.")
        _require(
            self.micro_batch is None or self.micro_batch <= self.batch_size,
            f"train.micro_batch: expected at most batch_size={self.batch_size}, got {self.micro_batch}.",
        )
        _require(self.learning_rate > 0, f"train.learning_rate: expected more than 0, got {self.learning_rate}.")
        _require(self.weight_decay >= 0, f"train.weight_decay: expected at least 0, got {self.weight_decay}.")
        for name in ("momentum", "warmup_fraction", "label_smoothing"):
            value = getattr(self, name)
            _require(0 <= value < 1, f"train.{name}: expected a number in [0, 1), got {value}.")
        _require(
            self.clip_norm is None or self.clip_norm > 0,
            f"train.clip_norm: expected more than 0, got {self.clip_norm}.",
        )
        _require(
            not (self.layerwise_update and self.clip_norm is not None),
            "train.layerwise_update: expected train.clip_norm null, since the norm of the whole gradient is known only "
            f"at the end, got {self.clip_norm}.",
        )
        _require(
            self.checkpoint_every >= 0, f"train.checkpoint_every: expected at least 0, got {self.checkpoint_every}."
        )
        _require(0 <= self.seed < 2**63, f"train.seed: expected a number in [0, 2^63), got {self.seed}.")


@dataclass(frozen=True)
class RunConfig:
    """One training run."""

    method: Method = "thin"
    """thin, wasi, wsi, asi, amc, lora, lora_fa, svd_lora, galore, head or dense."""
    model: ModelConfig = field(default_factory=ModelConfig)
    """Which model is trained."""
    data: DataConfig = field(default_factory=DataConfig)
    """Which images are read and how they are split."""
    train: TrainConfig = field(default_factory=TrainConfig)
    """How the model is trained."""
    thin: ThinConfig = field(default_factory=ThinConfig)
    """How linear layers become thin."""
    lora: LoraConfig = field(default_factory=LoraConfig)
    """The adapters of `lora`, `lora_fa` (`peft`) and `svd_lora`."""
    galore: GaloreConfig = field(default_factory=GaloreConfig)
    """The subspaces of `galore` (`pytorch-optimizer`)."""
    device: str = "cpu"
    """cpu or cuda."""
    threads: int | None = None
    """CPU threads; default: all that torch finds."""

    def __post_init__(self) -> None:
        _require(
            self.method in METHODS,
            f"method: expected one of {', '.join(METHODS)}, got {self.method!r}.{nearest(self.method, METHODS)}",
        )
        _require(self.device.split(":")[0] in ("cpu", "cuda"), f"device: expected cpu or cuda, got {self.device!r}.")
        _require(self.threads is None or self.threads >= 1, f"threads: expected at least 1, got {self.threads}.")


PARTS = {
    "model": ModelConfig,
    "data": DataConfig,
    "train": TrainConfig,
    "thin": ThinConfig,
    "lora": LoraConfig,
    "galore": GaloreConfig,
}
"""The parts of a configuration, by name."""


def to_dict(config: RunConfig) -> dict[str, Any]:
    """Returns the configuration as nested dictionaries of JSON values."""
    return dataclasses.asdict(config)


def from_dict(document: dict[str, Any]) -> RunConfig:
    """Rebuilds a configuration from `to_dict`.

    Raises:
        ConfigError: an unknown key, with the nearest known one.
    """
    document = dict(document)
    for part, cls in PARTS.items():
        values = document.get(part, {})
        _check_keys(values, cls, f"{part}.")
        document[part] = cls(**values)
    _check_keys(document, RunConfig, "")
    return RunConfig(**document)


def _check_keys(values: dict[str, Any], cls: type, prefix: str) -> None:
    known = [f.name for f in dataclasses.fields(cls)]
    for key in values:
        if key not in known:
            raise ConfigError(f"{prefix}{key}: unknown configuration key.{nearest(key, known)}")
