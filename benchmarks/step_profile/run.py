"""Where the time of an optimizer step goes, for rows of `thintune bench cost`, by torch's profiler.

Takes the weights that a bench has prepared, so run `thintune bench cost --out FOLDER` first. Each row is profiled in a
process of its own. Shares are of wall-clock time; what no operation accounts for is Python, autograd's bookkeeping and
the allocator.

    thintune bench cost --out runs/cost --rows thin-0.4-mb4 --repeats 1
    python benchmarks/step_profile/run.py --bench runs/cost --rows dense-mb4 thin-0.4-mb4 --images 16
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from thintune.bench.cost.ours import Ours, data_config, run_config, thin_folder
from thintune.bench.cost.peers import Peer
from thintune.bench.cost.rows import PEERS, all_rows
from thintune.bench.cost.settings import settings_from_dict
from thintune.config import ModelConfig
from thintune.measure import provenance
from thintune.train.prepare import load_data

RESULT = Path(__file__).parent.parent / "results" / "step_profile.json"
KINDS = {
    "products of linear layers": ("mm", "addmm", "addmm_", "mm_out", "_linear_pointwise", "linear", "matmul", "addmv"),
    "products of attention": (
        "bmm",
        "baddbmm",
        "_scaled_dot_product_flash_attention_for_cpu",
        "_scaled_dot_product_flash_attention_for_cpu_backward",
    ),
    "softmax": ("softmax", "_softmax", "_softmax_backward_data"),
    "decompositions": (
        "linalg_cholesky_ex",
        "linalg_solve_triangular",
        "linalg_qr",
        "linalg_householder_product",
        "_linalg_solve_ex",
        "linalg_lu_factor_ex",
        "linalg_lu_solve",
        "geqrf",
        "linalg_eigh",
    ),
    "GELU": ("gelu", "gelu_", "gelu_backward"),
    "norms": ("native_layer_norm", "native_layer_norm_backward"),
    "convolution": ("mkldnn_convolution", "convolution_backward"),
    "copies and fills": ("copy_", "fill_", "zero_", "clone", "cat", "_to_copy", "index_select", "index"),
}


def kind_of(name: str) -> str:
    """Category of an operation of the profiler, by its bare name."""
    bare = name.rpartition("::")[2]
    return next((kind for kind, names in KINDS.items() if bare in names), "elementwise and other")


def profile_row(bench: Path, name: str, images: int) -> dict[str, object]:
    """Shares of one step on `images` images."""
    settings = settings_from_dict({**json.loads((bench / "bench.json").read_text()), "batch_size": images})
    row = next(row for row in all_rows(images) if row.name == name)
    splits, prepared = load_data(settings.model, data_config(settings)), bench / "prepared"
    file = json.loads((prepared / "dense" / "dense.json").read_text())["tensors"]["file"]
    dense = ModelConfig(settings.model.name, str(prepared / "dense" / file), options=settings.model.options)
    if row.method in PEERS:
        work = Peer(row, dense, splits, settings.image_size)
    else:
        if row.method == "thin" and row.kept is not None:
            folder = str(thin_folder(prepared, row.kept))
            dense = ModelConfig(settings.model.name, folder, options=settings.model.options)
        work = Ours(run_config(row, settings, dense), splits)
    indices = torch.arange(images)
    work.step(indices)
    begun = time.perf_counter()
    work.step(indices)
    plain = time.perf_counter() - begun
    with profile(activities=[ProfilerActivity.CPU]) as watched:
        begun = time.perf_counter()
        work.step(indices)
        wall = time.perf_counter() - begun
    seconds: dict[str, float] = {}
    for event in watched.key_averages():
        kind = kind_of(event.key)
        seconds[kind] = seconds.get(kind, 0.0) + event.self_cpu_time_total / 1e6
    shares = {kind: round(value / wall, 4) for kind, value in sorted(seconds.items(), key=lambda item: -item[1])}
    return {
        "row": name,
        "images": images,
        "s_per_image": round(plain / images, 4),
        "s_per_image_profiled": round(wall / images, 4),
        "shares": {**shares, "outside of operations": round(1 - sum(shares.values()), 4)},
    }


def main() -> None:
    """Profiles the rows one after another and writes the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bench", type=Path, required=True, help="folder of `thintune bench cost`")
    parser.add_argument("--rows", nargs="+", default=["dense-mb4", "lora-mb4", "thin-0.4-mb4", "thin-0.4-mb1"])
    parser.add_argument("--images", type=int, default=16, help="of the profiled step")
    parser.add_argument("--one", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one is not None:
        arguments.one.write_text(json.dumps(profile_row(arguments.bench, arguments.rows[0], arguments.images)))
        return
    found = []
    for name in arguments.rows:
        with tempfile.TemporaryDirectory() as folder:
            answer = Path(folder) / "answer.json"
            words = ["--bench", str(arguments.bench), "--rows", name, "--images", str(arguments.images)]
            subprocess.run([sys.executable, __file__, *words, "--one", str(answer)], check=True)
            found.append(json.loads(answer.read_text()))
    document = {
        "rows": found,
        "threads": torch.get_num_threads(),
        "versions": provenance.versions(),
        "command": "python benchmarks/step_profile/run.py " + " ".join(sys.argv[1:]),
        "date": provenance.date(),
        "git_commit": provenance.git_commit(),
    }
    RESULT.write_text(json.dumps(document, indent=2) + "\n")
    for row in found:
        print(row["row"], row["s_per_image"], row["shares"])


if __name__ == "__main__":
    main()
