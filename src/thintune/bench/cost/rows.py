"""The rows of `thintune bench cost`, as data."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from thintune.bench.shared import matching

RowMethod = Literal["dense", "lora", "galore", "asi", "wsi", "wasi", "thin"]
Update = Literal["after", "in_backward", "in_momentum"]
PEERS: tuple[RowMethod, ...] = ("dense", "lora", "galore")
"""Methods that run in plain PyTorch loops; all others are thintune's own."""
RANK = 16
"""Of LoRA's adapters and of GaLore's gradients."""
PUBLISHED_KEPT = 0.64
"""Share of the weights that explained variance 0.8 keeps of a DINOv2 ViT-S/14: random weights have no decay to cut."""
_LEAST_MEMORY = 2
_MICRO_BATCHES = (16, 4, 1)
_THIN_MICRO_BATCHES = (16, 4, 2, 1)


@dataclass(frozen=True)
class Row:
    """One way to take the same optimizer step.

    Attributes:
        name: of the row, made of the settings below.
        method: peer or thintune's own.
        micro_batch: images of one forward and backward pass; None for the whole batch in one piece.
        update: when a peer's optimizer steps: after the last micro-batch; in the backward pass, parameter by
            parameter (GaLore instead projects there, and adds up what is projected); or after it with the gradients
            added up in the momentum, which saves SGD one buffer.
        checkpointing: blocks keep their input and are computed anew in the backward pass.
        kept: share of the converted weights.
        factor_dtype: type in which thin factors are stored.
        mapped: frozen weights stay in the mapped file.
    """

    name: str
    method: RowMethod
    micro_batch: int | None
    update: Update = "after"
    checkpointing: bool = False
    kept: float | None = None
    factor_dtype: Literal["float32", "bfloat16"] = "float32"
    mapped: bool = False

    @property
    def optimizer_in_backward(self) -> bool:
        """Whether a gradient is used up and freed inside the backward pass."""
        return self.update == "in_backward"

    @property
    def reuse_memory(self) -> bool:
        """`train.reuse_memory` of thintune's rows."""
        return reuses_memory(self.micro_batch)

    @property
    def exact_accumulation(self) -> bool:
        """Whether the step is that of the whole batch, whatever the micro-batch."""
        return not (self.method == "dense" and self.optimizer_in_backward and self.micro_batch is not None)

    @property
    def exact_gradients(self) -> str:
        """Whether the gradients are those of the batch, in words for the table."""
        reasons = [_INEXACT[self.method]] if self.method in _INEXACT else []
        if not self.exact_accumulation:
            reasons.append("one step a micro-batch")
        if reasons:
            return f"no: {'; '.join(reasons)}"
        return {"lora": "yes, of the adapters", "wsi": "yes, of the factors"}.get(self.method, "yes")


def reuses_memory(micro_batch: int | None) -> bool:
    """Up to two images at a time a row asks for the least memory, with more for speed."""
    return micro_batch is None or micro_batch > _LEAST_MEMORY


_INEXACT = {
    "galore": f"projected to rank {RANK}",
    "asi": "inputs as Tucker forms",
    "wasi": "inputs as Tucker forms",
    "thin": "in the kept directions of the inputs, norms to about 50 dB",
}


def all_rows(batch_size: int) -> list[Row]:
    """Every row that a batch of this size allows."""
    made = [*_dense(), *_lora(), *_galore(), *_published(), *_thin()]
    return [row for row in made if row.micro_batch is None or row.micro_batch < batch_size]


def select_rows(patterns: str, batch_size: int) -> list[Row]:
    """The rows whose name one of the patterns matches, in the order of the table.

    Args:
        patterns: shell patterns with commas between.
        batch_size: of the bench.

    Raises:
        ConfigError: a pattern that matches no row.
    """
    rows = all_rows(batch_size)
    found = matching(patterns, [row.name for row in rows])
    return [row for row in rows if row.name in found]


def _piece(micro_batch: int | None) -> str:
    return "full" if micro_batch is None else f"mb{micro_batch}"


def _peer(method: RowMethod, micro: int | None, update: Update, checkpointing: bool, mapped: bool = False) -> Row:
    words = [method, _piece(micro)]
    words += [] if update == "after" else [update.replace("_", "-")]
    words += ["ckpt"] if checkpointing else []
    words += ["mapped"] if mapped else []
    return Row("-".join(words), method, micro, update, checkpointing, mapped=mapped)


def _dense() -> Iterator[Row]:
    updates: Sequence[Update] = ("after", "in_backward", "in_momentum")
    for micro in (None, *_MICRO_BATCHES):
        for update in updates[: 2 if micro is None else 3]:
            yield from (_peer("dense", micro, update, checkpointing) for checkpointing in (False, True))


def _lora() -> Iterator[Row]:
    for micro in _MICRO_BATCHES:
        yield from (_peer("lora", micro, "after", checkpointing) for checkpointing in (False, True))
    for micro in _MICRO_BATCHES[1:]:
        yield _peer("lora", micro, "after", True, mapped=True)


def _galore() -> Iterator[Row]:
    for micro in _MICRO_BATCHES:
        for update in ("after", "in_backward"):
            yield from (_peer("galore", micro, update, checkpointing) for checkpointing in (False, True))


def _published() -> Iterator[Row]:
    for method in ("asi", "wsi", "wasi"):
        kept = None if method == "asi" else PUBLISHED_KEPT
        for micro in (None, *_MICRO_BATCHES):
            yield Row(f"{method}-{_piece(micro)}", method, micro, kept=kept)


def _thin() -> Iterator[Row]:
    for kept in (0.6, 0.4, 0.25):
        for micro in _THIN_MICRO_BATCHES:
            yield Row(f"thin-{kept}-mb{micro}", "thin", micro, kept=kept)
            yield Row(f"thin-{kept}-bf16-mb{micro}", "thin", micro, kept=kept, factor_dtype="bfloat16")
