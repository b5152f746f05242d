"""Fine-tune transformers where memory is scarce: thin weights, thin activations, thin checkpoints."""

from thintune import measure
from thintune.config import ThinConfig
from thintune.convert import convert_, make_trainable_, merge_
from thintune.io import load_checkpoint_, save_checkpoint
from thintune.optim import ThinStep

__all__ = [
    "ThinConfig",
    "ThinStep",
    "__version__",
    "convert_",
    "load_checkpoint_",
    "make_trainable_",
    "measure",
    "merge_",
    "save_checkpoint",
]

__version__ = "0.1.0"
