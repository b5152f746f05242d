"""What runs in the fresh process of a row: `python -m thintune.bench.cost.worker ORDER.json RESULT.json`."""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import os
import re
import shutil
import statistics
import sys
import time
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from thintune.bench.cost.accounting import paper_columns
from thintune.bench.cost.ours import Ours, conversion_config, data_config, run_config, thin_folder
from thintune.bench.cost.peers import Peer, import_galore
from thintune.bench.cost.prediction import predicted_peak_bytes
from thintune.bench.cost.rows import PEERS, Row, all_rows
from thintune.bench.cost.settings import CostSettings, settings_from_dict
from thintune.config import DataConfig, ModelConfig, RunConfig
from thintune.data import Splits
from thintune.io import read_document, save_checkpoint, write_tensors, write_text
from thintune.measure import (
    keep_freed_blocks,
    peak_rss_bytes,
    provenance,
    release_free_memory,
    reset_peak_rss,
    rss_bytes,
)
from thintune.ops import limit_kernels
from thintune.train.lora import import_peft, merge_lora_
from thintune.train.models import build_model
from thintune.train.prepare import build, import_libraries, load_data

INFERENCE_BATCHES = (1, 16)
_INFERENCE_RUNS = 3


class Trainable(Protocol):
    """A model and its optimizer step."""

    model: nn.Module

    def step(self, rows: Tensor) -> None:
        """One optimizer step on the images of these rows."""


def main(order: str, result: str) -> int:
    """Does what the order says and writes what came of it; returns the exit code."""
    asked = json.loads(Path(order).read_text(encoding="utf-8"))
    settings = settings_from_dict(asked["settings"])
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    try:
        _Order(asked, settings, Path(result)).execute()
    except Exception as error:
        write_text(Path(result), json.dumps({"error": f"{type(error).__name__}: {error}"}))
        return 1
    return 0


class _Order:
    def __init__(self, asked: dict[str, Any], settings: CostSettings, result: Path) -> None:
        self.asked, self.settings, self.result = asked, settings, result
        self.prepared = Path(asked["prepared"])
        self.found: dict[str, Any] = {}

    def execute(self) -> None:
        phase = self.asked["phase"]
        if phase == "prepare":
            self._prepare()
        else:
            row = next(row for row in all_rows(self.settings.batch_size) if row.name == self.asked["row"])
            self._note_baseline(row)
            if phase == "row":
                self._measure(row)
        self._write()

    def _write(self) -> None:
        write_text(self.result, json.dumps(self.found))

    def _prepare(self) -> None:
        """Writes the dense file and the thin checkpoints that are missing."""
        settings = self.settings
        dense = self.prepared / "dense"
        if not (dense / "dense.json").is_file():
            torch.manual_seed(settings.seed)
            model = build_model(settings.model, settings.classes, settings.image_size)
            write_tensors(dense, "dense", model.state_dict(), {})
            del model
        splits = self._splits()
        for kept in self.asked["kept"]:
            folder = thin_folder(self.prepared, kept)
            if not (folder / "checkpoint.json").is_file():
                config = conversion_config(kept, settings, self._dense())
                save_checkpoint(build(config, splits)[0], folder, {"classes": settings.classes})

    def _dense(self) -> ModelConfig:
        path = self.prepared / "dense" / read_document(self.prepared / "dense" / "dense.json")["tensors"]["file"]
        model = self.settings.model
        return ModelConfig(model.name, str(path), options=model.options)

    def _splits(self) -> Splits:
        return load_data(self.settings.model, data_config(self.settings))

    def _note_baseline(self, row: Row) -> None:
        """Imports all that the row will need; what is resident then is its baseline."""
        import_libraries(RunConfig(method="dense", data=DataConfig(name="synthetic")))
        if row.method == "lora":
            import_peft()
        elif row.method == "galore":
            import_galore()
        if row.checkpointing:
            importlib.import_module("torch.utils.checkpoint")
        gc.collect()
        release_free_memory()
        self.found["baseline_rss_bytes"] = rss_bytes()
        self.found["baseline_private_bytes"] = _private_bytes()
        if self.asked["usage_file"] is not None:
            with contextlib.suppress(OSError):
                self.found["baseline_charged_bytes"] = int(Path(self.asked["usage_file"]).read_text())
        self.found["allocator"] = {name: value for name, value in os.environ.items() if name.startswith("MALLOC_")}
        self.found["threads"] = torch.get_num_threads()
        self.found["versions"] = provenance.versions((*provenance.LIBRARIES, "safetensors", "pytorch-optimizer"))

    def _measure(self, row: Row) -> None:
        found, settings = self.found, self.settings
        peak_is_reset = reset_peak_rss()  # what importing took for a moment is not the row's
        begun = time.perf_counter()
        trainable = self._load(row)
        found["load_s"] = round(time.perf_counter() - begun, 3)
        found["load_peak_above_baseline_bytes"] = self._above_baseline()
        release_free_memory()
        peak_is_reset = reset_peak_rss() and peak_is_reset
        self._train(row, trainable)
        trained = self._above_baseline()
        loaded = found["load_peak_above_baseline_bytes"]
        found["train_peak_above_baseline_bytes"] = trained if peak_is_reset else None
        found["peak_above_baseline_bytes"] = None if trained is None or loaded is None else max(loaded, trained)
        model = trainable.model
        if row.method not in ("asi", "wasi"):
            found["predicted_peak_bytes"] = self._predict(row, model, None)
        self._write()  # whatever happens from here on, the training is done
        if not self.asked["inference"]:
            return
        found.update(self._checkpoint(row, model))
        del trainable
        for parameter in model.parameters():
            parameter.grad = None
        release_free_memory()
        if row.method == "lora":
            merge_lora_(model)
        limit_kernels(None)  # as in a process that serves: memory is no longer counted
        keep_freed_blocks()
        split = self._splits().train
        found["inference_images_per_s"] = {
            str(size): _inference_speed(model, split.images(torch.arange(size))) for size in INFERENCE_BATCHES
        }
        found["paper"] = paper_columns(model, row, split.images(torch.arange(1)), settings.batch_size)
        if row.method in ("asi", "wasi"):
            found["predicted_peak_bytes"] = self._predict(row, model, found["paper"]["activation_bytes"])

    def _predict(self, row: Row, model: nn.Module, kept_inputs_bytes: int | None) -> int | None:
        settings = self.settings
        return predicted_peak_bytes(model, row, settings.image_size, settings.batch_size, kept_inputs_bytes)

    def _load(self, row: Row) -> Trainable:
        settings, splits = self.settings, self._splits()
        if row.method in PEERS:
            return Peer(row, self._dense(), splits, settings.image_size)
        model = self._dense()
        if row.method == "thin":
            assert row.kept is not None
            model = ModelConfig(model.name, str(thin_folder(self.prepared, row.kept)), options=model.options)
        return Ours(run_config(row, settings, model), splits)

    def _train(self, row: Row, trainable: Trainable) -> None:
        settings = self.settings
        piece = 1 if row.micro_batch is None else row.micro_batch
        begun = time.perf_counter()
        trainable.step(torch.arange(min(2 * piece, settings.batch_size)))
        self.found["warm_up_s"] = round(time.perf_counter() - begun, 3)
        rows = torch.arange(settings.batch_size)
        times = self.found["s_per_image"] = []
        for _ in range(settings.steps):
            begun = time.perf_counter()
            trainable.step(rows)
            times.append((time.perf_counter() - begun) / settings.batch_size)

    def _above_baseline(self) -> int | None:
        peak, baseline = peak_rss_bytes(), self.found["baseline_rss_bytes"]
        return None if peak is None or baseline is None else max(peak - baseline, 0)

    def _checkpoint(self, row: Row, model: nn.Module) -> dict[str, Any]:
        """Bytes on disk of what training leaves, and of what it needs beside it."""
        folder = Path(self.asked["scratch"]) / "checkpoint"
        try:
            if row.method != "lora":
                return {"checkpoint_bytes": save_checkpoint(model, folder).size_bytes, "checkpoint_base_bytes": 0}
            trained = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
            write_tensors(folder, "adapters", trained, {})
            size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
            base = Path(str(self._dense().checkpoint)).stat().st_size
            return {"checkpoint_bytes": size, "checkpoint_base_bytes": base}
        finally:
            shutil.rmtree(folder, ignore_errors=True)


@torch.no_grad()
def _inference_speed(model: nn.Module, images: Tensor) -> float:
    """Images a second, median of a few passes after one."""
    model.eval()
    model(images)
    times = []
    for _ in range(_INFERENCE_RUNS):
        begun = time.perf_counter()
        model(images)
        times.append(time.perf_counter() - begun)
    return len(images) / statistics.median(times)


def _private_bytes() -> int | None:
    """Resident memory that belongs to no file, None where the system does not tell."""
    with contextlib.suppress(OSError):
        found = re.search(r"^RssAnon:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
        return int(found[1]) * 1024 if found else None
    return None


if __name__ == "__main__":
    raise SystemExit(main(*sys.argv[1:]))
