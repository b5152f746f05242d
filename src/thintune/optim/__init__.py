"""The subspace step, hooked onto any torch optimizer."""

from thintune.optim.layerwise import LayerwiseStep
from thintune.optim.parameters import build_optimizer, learning_rate_factor
from thintune.optim.step import ThinStep

__all__ = ["LayerwiseStep", "ThinStep", "build_optimizer", "learning_rate_factor"]
