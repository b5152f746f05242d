import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from thintune.measure import track, tracker

MEBIBYTE = 1 << 20


class FakeProcess:
    """Resident memory that the test sets, with the high-water mark of a real kernel."""

    def __init__(self, monkeypatch, *, can_reset: bool):
        self.rss = self.peak = 100
        self.can_reset = can_reset
        monkeypatch.setattr(tracker, "rss_bytes", lambda: self.rss)
        monkeypatch.setattr(tracker, "peak_rss_bytes", lambda: self.peak)
        monkeypatch.setattr(tracker, "reset_peak_rss", self.reset)

    def reset(self) -> bool:
        if self.can_reset:
            self.peak = self.rss
        return self.can_reset

    def go_to(self, rss: int) -> None:
        self.rss = rss
        self.peak = max(self.peak, rss)


def test_the_peak_is_that_of_the_block(monkeypatch):
    process = FakeProcess(monkeypatch, can_reset=True)
    process.go_to(900)
    process.go_to(150)
    with track() as m:
        process.go_to(400)
        process.go_to(200)
    assert (m.baseline_rss_bytes, m.peak_rss_bytes, m.peak_above_baseline_bytes) == (150, 400, 250)
    assert m.peak_is_exact is True


def test_without_a_reset_a_mark_that_did_not_rise_is_only_a_bound(monkeypatch):
    process = FakeProcess(monkeypatch, can_reset=False)
    process.go_to(900)
    process.go_to(150)
    with track() as m:
        process.go_to(400)
    assert (m.peak_rss_bytes, m.peak_above_baseline_bytes, m.peak_is_exact) == (900, 750, False)


def test_without_a_reset_a_mark_that_rose_is_exact(monkeypatch):
    process = FakeProcess(monkeypatch, can_reset=False)
    process.go_to(300)
    with track() as m:
        process.go_to(400)
    assert (m.peak_rss_bytes, m.peak_is_exact) == (400, True)


def test_an_inner_block_does_not_take_the_peak_from_the_outer_one(monkeypatch):
    process = FakeProcess(monkeypatch, can_reset=True)
    with track() as outer:
        process.go_to(800)
        process.go_to(200)
        with track() as inner:
            process.go_to(300)
    assert (inner.baseline_rss_bytes, inner.peak_rss_bytes) == (200, 300)
    assert (outer.baseline_rss_bytes, outer.peak_rss_bytes) == (100, 800)


def test_what_the_system_does_not_tell_is_none(monkeypatch):
    for name in ("rss_bytes", "peak_rss_bytes"):
        monkeypatch.setattr(tracker, name, lambda: None)
    monkeypatch.setattr(tracker, "reset_peak_rss", lambda: False)
    with track() as m:
        pass
    assert m.baseline_rss_bytes is m.peak_rss_bytes is m.peak_above_baseline_bytes is m.peak_is_exact is None
    assert m.saved_activation_bytes is None  # no model was given
    assert m.duration_s is not None


def test_without_a_gpu_its_peak_is_none(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    with track() as m:
        pass
    assert m.cuda_peak_bytes is None


def test_the_peak_of_the_fullest_gpu_from_the_start_of_the_block(monkeypatch):
    peaks = {0: 999, 1: 999}
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: peaks.update({device: 0}))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: peaks[device])
    with track() as outer:
        peaks[0] = 70
        with track() as inner:
            peaks[1] = 50
    assert inner.cuda_peak_bytes == 50
    assert outer.cuda_peak_bytes == 70


def test_saved_activations_are_those_of_the_worst_step_without_weights():
    model = nn.Linear(5, 7)
    with track(model) as m:
        for batch in (3, 11, 2):
            model(torch.randn(batch, 5, requires_grad=True)).sum().backward()
    assert m.saved_activation_bytes == 4 * 11 * 5


def test_an_evaluation_saves_nothing_and_says_zero():
    model = nn.Linear(5, 7)
    with track(model) as m, torch.no_grad():
        model(torch.randn(3, 5))
    assert m.saved_activation_bytes == 0


def test_activations_that_could_not_all_be_measured_are_none():
    model = nn.Linear(5, 7)
    with track(model) as m:
        torch.sparse.mm(torch.eye(3).to_sparse(), model(torch.randn(3, 5))).sum().backward()
    assert m.saved_activation_bytes is None


def test_the_clock_is_that_of_the_block(monkeypatch):
    now = [10.0]
    monkeypatch.setattr(tracker.time, "perf_counter", lambda: now[0])
    with track() as m:
        now[0] += 2.5
    assert m.duration_s == 2.5


def test_an_exception_passes_and_the_measurement_is_filled(monkeypatch):
    process = FakeProcess(monkeypatch, can_reset=True)
    with pytest.raises(ZeroDivisionError), track(nn.Linear(2, 3)) as m:
        process.go_to(300)
        _ = 1 / 0
    assert m.peak_rss_bytes == 300
    assert m.saved_activation_bytes == 0
    assert m.duration_s is not None
    assert not tracker._running


SCRIPT = """
import json
import torch
from thintune.measure import track

torch.empty(64 << 20, dtype=torch.uint8).fill_(1)  # before the block, higher than anything in it
with track() as m:
    block = torch.empty(24 << 20, dtype=torch.uint8).fill_(1)
    del block
print(json.dumps([m.baseline_rss_bytes, m.peak_rss_bytes, m.peak_above_baseline_bytes, m.peak_is_exact, m.duration_s]))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the system has no /proc")
def test_a_real_process():
    run = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True)
    baseline, peak, above, exact, duration = json.loads(run.stdout)
    assert above == peak - baseline
    assert duration > 0
    if exact:
        assert above == pytest.approx(24 * MEBIBYTE, abs=6 * MEBIBYTE)
    else:
        assert above >= 24 * MEBIBYTE
