"""What a conversion did, layer by layer."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class LayerReport:
    """One linear layer of the model."""

    name: str
    out_features: int
    in_features: int
    rank: int | None
    """Rank of the weight; None for a weight left dense."""
    activation_ranks: tuple[int, ...] | None
    """Ranks of the kept input, the feature mode last; empty: chosen anew at every step; None: input kept whole."""
    bytes_before: int
    bytes_after: int
    skipped: str | None = None
    """Why the layer was left as it was, or None."""


@dataclass(frozen=True)
class ConversionReport:
    """The conversion of a model."""

    method: str
    layers: list[LayerReport] = field(default_factory=list)
    blocks: dict[str, str | None] = field(default_factory=dict)
    """Transformer blocks of a known kind by name, and what kept each from being lean, or None."""

    @property
    def converted(self) -> list[LayerReport]:
        """The layers that were replaced."""
        return [layer for layer in self.layers if layer.skipped is None]

    @property
    def bytes_before(self) -> int:
        """Bytes of the converted layers' weights before."""
        return sum(layer.bytes_before for layer in self.converted)

    @property
    def bytes_after(self) -> int:
        """Bytes of the converted layers' weights or factors after."""
        return sum(layer.bytes_after for layer in self.converted)

    @property
    def kept_weight_fraction(self) -> float:
        """Share of the converted layers' weights that is left."""
        return self.bytes_after / self.bytes_before if self.converted else 1.0

    def __str__(self) -> str:
        lines = [f"{'layer':<32} {'out x in':>12} {'rank':>5} {'input ranks':>14} {'kB before':>10} {'kB after':>10}"]
        for layer in self.layers:
            shape = f"{layer.out_features} x {layer.in_features}"
            if layer.skipped is not None:
                lines.append(f"{layer.name:<32} {shape:>12} skipped: {layer.skipped}")
                continue
            ranks = "whole" if layer.activation_ranks is None else "x".join(map(str, layer.activation_ranks)) or "any"
            lines.append(
                f"{layer.name:<32} {shape:>12} {layer.rank or 'dense':>5} {ranks:>14} "
                f"{layer.bytes_before / 1e3:>10.1f} {layer.bytes_after / 1e3:>10.1f}"
            )
        lines.append(
            f"{len(self.converted)} of {len(self.layers)} linear layers converted ({self.method}); weights "
            f"{self.bytes_before / 1e6:.2f} MB -> {self.bytes_after / 1e6:.2f} MB, {self.kept_weight_fraction:.3f} kept"
        )
        if self.blocks:
            lean = sum(reason is None for reason in self.blocks.values())
            lines.append(f"{lean} of {len(self.blocks)} blocks keep little for the backward pass")
            lines += [f"{name}: not lean: {reason}" for name, reason in self.blocks.items() if reason is not None]
        return "\n".join(lines)
