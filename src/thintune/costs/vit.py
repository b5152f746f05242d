"""Closed-form memory of training a whole vision transformer: what lives at the peak of a step, term by term.

The model is a pre-norm ViT of `depth` blocks (norm, qkv, attention, proj; norm, fc1, GELU, fc2) with a patch
embedding, a class token, a final norm and a linear head, trained in float32 with SGD and momentum.

Legend: B images of one micro-batch, N tokens, D width, H hidden width, c classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from thintune.costs.linear import FLOAT_BYTES, lean_branch_saved_bytes

RUNTIME_BYTES = 30_000_000
"""What the first steps of any run add beyond tensors: pages of the libraries' code, packing buffers of the matrix
products. Measured on x86 with two threads, where importing alone is the baseline."""

KERNEL_BYTES = 600_000
"""Code that oneDNN generates for one shape of a product, and its tables."""

HOLES_BYTES = 15_000_000
"""What freed blocks below a megabyte leave in the heap of a thin run that keeps them for use again."""


@dataclass(frozen=True)
class Layer:
    """One linear layer."""

    in_features: int
    out_features: int
    rank: int | None = None
    """K of a thin layer, None for a dense one."""


@dataclass(frozen=True)
class VitShape:
    """Sizes of a vision transformer."""

    width: int
    depth: int
    heads: int
    hidden: int
    image_size: int
    patch_size: int
    classes: int
    channels: int = 3

    @property
    def tokens(self) -> int:
        """N: patches and the class token."""
        return (self.image_size // self.patch_size) ** 2 + 1

    @property
    def layers(self) -> tuple[Layer, Layer, Layer, Layer]:
        """Qkv, proj, fc1 and fc2 of a block, dense."""
        d, h = self.width, self.hidden
        return Layer(d, 3 * d), Layer(d, d), Layer(d, h), Layer(h, d)

    @property
    def linear_parameters(self) -> int:
        """Weights of the blocks' linear layers."""
        return self.depth * sum(layer.in_features * layer.out_features for layer in self.layers)

    @property
    def other_parameters(self) -> int:
        """Everything else: biases, norms, patch embedding, positional table, class token, head."""
        d = self.width
        block = sum(layer.out_features for layer in self.layers) + 4 * d
        patches = self.channels * self.patch_size**2 * d + d
        return self.depth * block + patches + (self.tokens + 1) * d + 2 * d + (d + 1) * self.classes

    @property
    def parameters(self) -> int:
        """All of them."""
        return self.linear_parameters + self.other_parameters


def dense_block_saved_values(shape: VitShape, adapter_rank: int = 0) -> int:
    """Values an image that autograd keeps in one block: N (8 D + 2 H + heads + 4 + 4 r).

    Inputs of both norms, of qkv, proj, fc1, GELU and fc2, then q, k, v; a log-sum a head, mean and 1 / std of the
    norms, and the inner values of four LoRA adapters of rank r.
    """
    return shape.tokens * (8 * shape.width + 2 * shape.hidden + shape.heads + 4 + 4 * adapter_rank)


def outer_saved_values(shape: VitShape) -> int:
    """Values an image kept outside the blocks: the image, input and output of the final norm, its mean and 1 / std."""
    return shape.channels * shape.image_size**2 + shape.tokens * (2 * shape.width + 2)


def saved_bytes(
    shape: VitShape, images: int, *, checkpointing: bool = False, adapter_rank: int = 0, trains_input: bool = True
) -> int:
    """Bytes that autograd keeps for `images` of a dense model or one with LoRA adapters.

    With checkpointing it is the input of every block, and one block at a time in full.
    """
    block = dense_block_saved_values(shape, adapter_rank)
    blocks = shape.depth * shape.tokens * shape.width + block if checkpointing else shape.depth * block
    outer = outer_saved_values(shape) - (0 if trains_input else shape.channels * shape.image_size**2)
    return FLOAT_BYTES * images * (outer + blocks)


def _gradient_scratch_bytes(shape: VitShape, images: int) -> int:
    """Two gradients as wide as the hidden layer, and two as wide as the model."""
    return FLOAT_BYTES * images * shape.tokens * 2 * (shape.hidden + shape.width)


def dense_peak_bytes(
    shape: VitShape,
    micro_batch: int,
    batch_size: int,
    *,
    one_gradient_at_a_time: bool = False,
    checkpointing: bool = False,
    kept_inputs_bytes: int | None = None,
) -> int:
    """Peak above the imported libraries of dense training.

    Weights and momentum live throughout. Gradients do where micro-batches add up; in one piece they grow only as
    activations go, and with the optimizer in the backward pass, or where they add up in the momentum, there is one at
    a time.

    Args:
        shape: of the model.
        micro_batch: images of one forward and backward pass.
        batch_size: images of a step.
        one_gradient_at_a_time: see above.
        checkpointing: of whole blocks.
        kept_inputs_bytes: of the Tucker forms that the linear layers keep instead of their inputs (`asi`).
    """
    weights = FLOAT_BYTES * shape.parameters
    saved = saved_bytes(shape, micro_batch, checkpointing=checkpointing)
    if kept_inputs_bytes is not None:
        saved += kept_inputs_bytes - linear_input_bytes(shape, micro_batch)
    working = saved + _gradient_scratch_bytes(shape, micro_batch)
    if one_gradient_at_a_time:
        return RUNTIME_BYTES + 2 * weights + working + _largest_weight_bytes(shape)
    if micro_batch < batch_size:
        return RUNTIME_BYTES + 3 * weights + working
    return RUNTIME_BYTES + 2 * weights + max(working, weights)


def linear_input_bytes(shape: VitShape, images: int) -> int:
    """Bytes that a dense model keeps for its linear layers alone: inputs of qkv, fc1, fc2 (attention keeps proj's)."""
    return FLOAT_BYTES * images * shape.depth * shape.tokens * (2 * shape.width + shape.hidden)


def _largest_weight_bytes(shape: VitShape) -> int:
    return FLOAT_BYTES * max(layer.in_features * layer.out_features for layer in shape.layers)


def factor_peak_bytes(
    shape: VitShape, micro_batch: int, ranks: Sequence[int], kept_inputs_bytes: int | None = None
) -> int:
    """Peak above the imported libraries of `wsi` and `wasi`, which train both factors, converted in the same process.

    Factors, their gradients and their momentum, the rest three times over too; while they are converted it is the
    dense model, the factors so far and the decomposition of one weight.

    Args:
        shape: of the model.
        micro_batch: images of one forward and backward pass, smaller than the batch.
        ranks: of qkv, proj, fc1 and fc2 of every block.
        kept_inputs_bytes: of the Tucker forms that the layers keep instead of their inputs (`wasi`).
    """
    factors = shape.depth * sum(k * (a.in_features + a.out_features) for a, k in zip(shape.layers, ranks, strict=True))
    saved = saved_bytes(shape, micro_batch)
    if kept_inputs_bytes is not None:
        saved += kept_inputs_bytes - linear_input_bytes(shape, micro_batch)
    training = (
        3 * FLOAT_BYTES * (factors + shape.other_parameters) + saved + _gradient_scratch_bytes(shape, micro_batch)
    )
    converting = FLOAT_BYTES * shape.parameters + 4 * _largest_weight_bytes(shape)
    return RUNTIME_BYTES + max(training, converting)


def galore_peak_bytes(
    shape: VitShape, micro_batch: int, rank: int, *, project_in_backward: bool = False, checkpointing: bool = False
) -> int:
    """Peak above the imported libraries of GaLore on every linear layer of the blocks, SGD with momentum.

    Weights, and of every matrix its projection, its projected gradient and its momentum; dense gradients of all of
    them or of one at a time; the rest three times over. The singular value decomposition of the largest gradient takes
    about five times its size, after the backward pass or in it.
    """
    low = (
        shape.depth
        * rank
        * sum(2 * max(a.in_features, a.out_features) + min(a.in_features, a.out_features) for a in shape.layers)
    )
    state = FLOAT_BYTES * (shape.linear_parameters + low + 3 * shape.other_parameters)
    saved = saved_bytes(shape, micro_batch, checkpointing=checkpointing)
    working, decomposing = saved + _gradient_scratch_bytes(shape, micro_batch), 5 * _largest_weight_bytes(shape)
    if project_in_backward:
        return RUNTIME_BYTES + state + working + decomposing
    return RUNTIME_BYTES + state + FLOAT_BYTES * shape.linear_parameters + max(working, decomposing)


def lora_peak_bytes(shape: VitShape, micro_batch: int, rank: int, *, checkpointing: bool = False) -> int:
    """Peak above the imported libraries of LoRA on every linear layer of the blocks, the head trained too."""
    adapters = shape.depth * sum(rank * (layer.in_features + layer.out_features) for layer in shape.layers)
    trained = adapters + (shape.width + 1) * shape.classes
    saved = saved_bytes(shape, micro_batch, checkpointing=checkpointing, adapter_rank=rank, trains_input=False)
    state = FLOAT_BYTES * (shape.parameters + adapters + 2 * trained)
    return RUNTIME_BYTES + state + saved + _gradient_scratch_bytes(shape, micro_batch)


def thin_ranks(shape: VitShape, kept: float) -> tuple[int, ...]:
    """Ranks that keep the same share of every layer: K = kept I O / (I + O)."""
    return tuple(
        max(1, int(kept * layer.in_features * layer.out_features / (layer.in_features + layer.out_features)))
        for layer in shape.layers
    )


def lean_saved_bytes(shape: VitShape, images: int, ranks: Sequence[int], activation_rank: int) -> int:
    """Bytes that lean blocks of thin layers keep; `ranks` are those of qkv, proj, fc1 and fc2 of every block."""
    rows, r = images * shape.tokens, activation_rank
    branches = (lean_branch_saved_bytes(rows, shape.width, ranks[i], r, r) for i in (0, 2))
    return shape.depth * sum(branches) + FLOAT_BYTES * images * outer_saved_values(shape)


def lean_scratch_bytes(shape: VitShape, images: int, ranks: Sequence[int], chunk_rows: int = 2048) -> int:
    """What a chunk of a branch takes, beside a repacked factor of the largest layer and twice the scores of one image.

    Its rows are there three times as wide as the widest layer and four times as wide as the model. A chunk is half
    the images, no more than fit into `chunk_rows` rows, and one at least.
    """
    rows = shape.tokens * max(1, min(images * shape.tokens // 2, chunk_rows) // shape.tokens)
    wide = max(shape.hidden, 3 * shape.width)
    packed = max(k * max(a.in_features, a.out_features) for a, k in zip(shape.layers, ranks, strict=True))
    scores = 2 * shape.heads * shape.tokens**2
    return FLOAT_BYTES * (rows * (3 * wide + 4 * shape.width) + packed + scores)


def fold_scratch_bytes(shape: VitShape, ranks: Sequence[int]) -> int:
    """K max(I, O) values and two K x K matrices in float64 of the layer where that is most."""
    return max(
        FLOAT_BYTES * k * max(layer.in_features, layer.out_features) + 16 * k * k
        for layer, k in zip(shape.layers, ranks, strict=True)
    )


def thin_peak_bytes(
    shape: VitShape,
    micro_batch: int,
    ranks: Sequence[int],
    activation_rank: int,
    *,
    factor_dtype: Literal["float32", "bfloat16"] = "float32",
    reuse_memory: bool = False,
) -> int:
    """Peak above the imported libraries of `thin` with lean blocks, SGD with momentum and layer-wise updates.

    Factors, bases, the momentum that gathers the gradients, everything that is not thin three times over (weights,
    momentum, and gradients of one layer at a time), and what is kept of one micro-batch. With
    `reuse_memory` there is a kernel for both products of every layer, and the heap keeps what is freed.
    """
    r = activation_rank
    factors = shape.depth * sum(k * (a.in_features + a.out_features) for a, k in zip(shape.layers, ranks, strict=True))
    bases = shape.depth * r * sum(layer.in_features for layer in shape.layers)
    momentum = shape.depth * r * sum(layer.out_features for layer in shape.layers)
    width = 2 if factor_dtype == "bfloat16" else FLOAT_BYTES
    widened = 0
    if factor_dtype == "bfloat16":
        pairs = [k * (a.in_features + a.out_features) for a, k in zip(shape.layers, ranks, strict=True)]
        widened = FLOAT_BYTES * sum(max(pairs[i], pairs[i + 2]) for i in (0, 1))
    state = width * factors + FLOAT_BYTES * (bases + momentum + 2 * shape.other_parameters)
    working = lean_saved_bytes(shape, micro_batch, ranks, r) + lean_scratch_bytes(shape, micro_batch, ranks)
    kept = KERNEL_BYTES * 2 * len(shape.layers) * shape.depth + HOLES_BYTES if reuse_memory else 0
    return RUNTIME_BYTES + state + widened + working + fold_scratch_bytes(shape, ranks) + kept
