"""Limits of the kernel, for real where the system permits them."""

import subprocess
import sys

import pytest

from thintune.bench import limits
from thintune.bench.cost.settings import Limit, parse_limit
from thintune.errors import ConfigError

permitted = pytest.mark.skipif(limits.why_not_permitted() is not None, reason="no control group can be made here")


@pytest.mark.parametrize(
    ("text", "limit"),
    [
        ("629145600", Limit(False, 629145600)),
        ("600MB", Limit(False, 600_000_000)),
        ("0.5 GiB", Limit(False, 2**29)),
        ("baseline+290MB", Limit(True, 290_000_000)),
    ],
)
def test_limits_are_read_with_units(text, limit):
    assert parse_limit(text) == limit


@pytest.mark.parametrize("text", ["", "much", "600 megabytes", "baseline", "0MB", "-3MB", "base+3MB"])
def test_other_words_are_no_limit(text):
    with pytest.raises(ConfigError, match=r"limit: expected bytes, as .* got"):
        parse_limit(text)


def take(group, size):
    source = f"a = bytearray({size})"
    return subprocess.run(group.command([sys.executable, "-c", source]), capture_output=True, check=False).returncode


@permitted
def test_the_kernel_kills_what_wants_more_and_the_group_is_gone_afterwards():
    with limits.MemoryGroup(64 << 20) as group:
        assert take(group, 16 << 20) == 0 and group.kills() == 0
        assert 16 << 20 < (group.peak_bytes() or 0) <= 64 << 20
        assert take(group, 200 << 20) == -9 and group.kills() == 1
        assert int(group.usage_file.read_text()) < 64 << 20
    assert not group.path.exists()


@permitted
def test_a_group_ends_what_still_runs_in_it():
    with limits.MemoryGroup() as group:
        source = "import time; print('in', flush=True); time.sleep(60)"
        words = group.command([sys.executable, "-c", source])
        sleeper = subprocess.Popen(words, stdout=subprocess.PIPE)
        assert sleeper.stdout is not None and sleeper.stdout.readline() == b"in\n"
    assert sleeper.wait(10) == -9 and not group.path.exists()
    sleeper.stdout.close()


def test_a_system_without_control_groups_says_why(monkeypatch, tmp_path):
    monkeypatch.setattr(limits, "_PROC", tmp_path)
    assert limits.why_not_permitted() == "no control group with a memory controller is mounted"
    (tmp_path / "cgroup").write_text("4:memory:/a/b\n0::/\n")
    point = tmp_path / "mounted"
    (point / "b").mkdir(parents=True)
    line = f"30 20 0:26 /a {point} rw - cgroup cgroup rw,memory\n31 20 0:27 / {tmp_path} rw - cgroup2 cgroup rw\n"
    (tmp_path / "mountinfo").write_text(line)
    reason = limits.why_not_permitted()
    assert reason is not None and f"{point / 'b'}: its memory controller is not handed down" in reason
    assert list((point / "b").iterdir()) == []
    with pytest.raises(limits.LimitNotPermittedError):
        limits.MemoryGroup(1 << 20)


def test_a_version_2_group_lies_beside_the_own_one_where_that_is_in_the_way(monkeypatch, tmp_path):
    """A pretended hierarchy: the kernel fills a new folder with files where the memory controller is handed down."""
    slice_, own = tmp_path / "mounted" / "user.slice", tmp_path / "mounted" / "user.slice" / "own.scope"
    own.mkdir(parents=True)
    (tmp_path / "cgroup").write_text("0::/user.slice/own.scope\n")
    (tmp_path / "mountinfo").write_text(f"31 20 0:27 / {tmp_path / 'mounted'} rw - cgroup2 cgroup rw\n")
    (own / "cgroup.controllers").write_text("cpu memory\n")
    monkeypatch.setattr(limits, "_PROC", tmp_path)
    make = limits.Path.mkdir

    def mkdir(path, *words, **more):
        make(path, *words, **more)
        if path.parent == slice_:
            for name, text in (("max", "max"), ("swap.max", "max"), ("peak", "7"), ("events", "oom 2\noom_kill 1\n")):
                (path / f"memory.{name}").write_text(text)
            monkeypatch.setattr(limits.Path, "rmdir", lambda folder: [file.unlink() for file in folder.iterdir()])

    monkeypatch.setattr(limits.Path, "mkdir", mkdir)
    with limits.MemoryGroup(1 << 20) as group:
        assert group.path.parent == slice_
        assert (group.path / "memory.max").read_text() == str(1 << 20)
        assert (group.path / "memory.swap.max").read_text() == "0"
        assert group.peak_bytes() == 7 and group.kills() == 1
        assert group.usage_file.name == "memory.current"
    assert (own / "cgroup.subtree_control").read_text() == "+memory"
    assert not (slice_ / "cgroup.subtree_control").exists()
