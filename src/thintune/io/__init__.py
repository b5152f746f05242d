"""Files: atomic writes and checkpoints."""

from thintune.io.checkpoint import Checkpoint, find_checkpoint, load_checkpoint_, read_checkpoint, save_checkpoint
from thintune.io.files import prepare_directory, read_document, write_text
from thintune.io.tensors import StoredTensors, read_tensors, write_tensors

__all__ = [
    "Checkpoint",
    "StoredTensors",
    "find_checkpoint",
    "load_checkpoint_",
    "prepare_directory",
    "read_checkpoint",
    "read_document",
    "read_tensors",
    "save_checkpoint",
    "write_tensors",
    "write_text",
]
