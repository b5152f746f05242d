"""Who has the last word on what the C library does with freed blocks."""

import pytest

from thintune.measure import allocator, keep_freed_blocks, return_freed_blocks, returning_large_blocks

MMAP, TRIM = -3, -1


class Library:
    def __init__(self):
        self.now = {}

    def mallopt(self, what, value):
        self.now[what] = value
        return 1


@pytest.fixture
def library(monkeypatch):
    found = Library()
    monkeypatch.setattr(allocator.ctypes, "CDLL", lambda _: found)
    monkeypatch.setattr(allocator, "_fixed", None)
    monkeypatch.setattr(allocator.sys, "platform", "linux")
    return found


def test_inside_large_blocks_go_back_and_afterwards_the_library_does_as_it_would_have(library):
    with returning_large_blocks(1 << 18):
        assert library.now == {MMAP: 1 << 18, TRIM: 1 << 19}
    assert library.now == {MMAP: 32 << 20, TRIM: 64 << 20}


def test_what_holds_for_the_whole_process_outlasts_a_part_of_it(library):
    assert return_freed_blocks(64 << 10)
    with returning_large_blocks(1 << 18):
        assert library.now[MMAP] == 64 << 10  # the smaller threshold does what is asked here, and more
    assert library.now == {MMAP: 64 << 10, TRIM: 128 << 10}


def test_a_larger_threshold_of_the_process_is_lowered_inside_and_comes_back(library):
    assert return_freed_blocks(1 << 20)
    with pytest.raises(ValueError), returning_large_blocks(1 << 18):
        assert library.now[MMAP] == 1 << 18
        raise ValueError
    assert library.now[MMAP] == 1 << 20


def test_a_process_that_serves_has_the_heap_that_it_would_have_had(library):
    assert return_freed_blocks(64 << 10)
    assert keep_freed_blocks()
    assert library.now == {MMAP: 32 << 20, TRIM: 64 << 20}
    with returning_large_blocks(1 << 18):
        pass
    assert library.now == {MMAP: 32 << 20, TRIM: 64 << 20}


def test_another_system_is_left_alone(library, monkeypatch):
    monkeypatch.setattr(allocator.sys, "platform", "darwin")
    assert not return_freed_blocks()
    with returning_large_blocks():
        pass
    assert library.now == {}
