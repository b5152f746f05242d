"""What the closed formulas say a row will take, before it is measured."""

from __future__ import annotations

from typing import Any

from torch import nn

from thintune.bench.cost.rows import RANK, Row
from thintune.costs import vit
from thintune.nn import SubspaceLinear, ThinLinear


def vit_shape(model: nn.Module, image_size: int) -> vit.VitShape | None:
    """Sizes of a plain vision transformer of timm, dense or converted; None for every other model."""
    blocks: Any = getattr(model, "blocks", None)
    embedding: Any = getattr(model, "patch_embed", None)
    try:
        first, head = blocks[0], model.get_submodule("head")
        return vit.VitShape(
            width=first.mlp.fc1.in_features,
            depth=len(blocks),
            heads=first.attn.num_heads,
            hidden=first.mlp.fc1.out_features,
            image_size=image_size,
            patch_size=embedding.patch_size[0],
            classes=int(head.out_features),  # pyright: ignore[reportArgumentType, reportCallIssue]
        )
    except (AttributeError, TypeError, IndexError):
        return None


def predicted_peak_bytes(
    model: nn.Module, row: Row, image_size: int, batch_size: int, kept_inputs_bytes: int | None
) -> int | None:
    """Peak of a row's process above the imported libraries, loading included.

    Args:
        model: as it trains, adapters or thin layers included.
        row: its settings.
        image_size: in pixels.
        batch_size: of the bench.
        kept_inputs_bytes: of one micro-batch's Tucker forms; `asi` and `wasi`.

    Returns:
        Bytes, None for a model that the formulas do not know.
    """
    shape = vit_shape(model, image_size)
    if shape is None:
        return None
    piece = row.micro_batch or batch_size
    if row.method == "lora":
        return vit.lora_peak_bytes(shape, piece, RANK, checkpointing=row.checkpointing)
    if row.method == "galore":
        return vit.galore_peak_bytes(
            shape, piece, RANK, project_in_backward=row.optimizer_in_backward, checkpointing=row.checkpointing
        )
    if row.method == "thin":
        width = next(m.basis.shape[1] for m in model.modules() if isinstance(m, SubspaceLinear))
        return vit.thin_peak_bytes(
            shape,
            piece,
            _ranks(model),
            width,
            factor_dtype=row.factor_dtype,
            reuse_memory=row.reuse_memory,
        )
    if row.method in ("wsi", "wasi"):
        return vit.factor_peak_bytes(shape, piece, _ranks(model), kept_inputs_bytes if row.method == "wasi" else None)
    return vit.dense_peak_bytes(
        shape,
        piece,
        batch_size,
        one_gradient_at_a_time=row.update != "after" or row.method == "asi",
        checkpointing=row.checkpointing,
        kept_inputs_bytes=kept_inputs_bytes if row.method == "asi" else None,
    )


def _ranks(model: nn.Module) -> tuple[int, ...]:
    """Mean ranks of qkv, proj, fc1 and fc2 over the blocks."""
    ranks: dict[str, list[int]] = {name: [] for name in ("qkv", "proj", "fc1", "fc2")}
    for name, module in model.named_modules():
        if isinstance(module, ThinLinear):
            ranks[name.rpartition(".")[2]].append(module.rank)
    return tuple(round(sum(found) / len(found)) for found in ranks.values())
