from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from thintune.data import epoch_batches, micro_batches

numbers = st.integers(0, 2**63 - 1)


@given(st.integers(0, 200), st.integers(1, 60), numbers, st.integers(0, 1000))
def test_every_row_once_in_full_batches_but_the_last(n, batch_size, seed, epoch):
    batches = epoch_batches(n, batch_size, seed, epoch)
    assert sorted(row for batch in batches for row in batch.tolist()) == list(range(n))
    assert [len(batch) for batch in batches[:-1]] == [batch_size] * (len(batches) - 1)
    assert all(len(batch) > 0 and batch.dtype == torch.int64 for batch in batches)


@given(st.integers(0, 100), st.integers(1, 30), numbers, st.integers(0, 50))
def test_order_depends_on_the_arguments_alone(n, batch_size, seed, epoch):
    first = epoch_batches(n, batch_size, seed, epoch)
    torch.manual_seed(99)
    torch.rand(3)
    second = epoch_batches(n, batch_size, seed, epoch)
    assert [b.tolist() for b in first] == [b.tolist() for b in second]


def test_drawing_leaves_the_global_generator_alone():
    before = torch.get_rng_state()
    epoch_batches(50, 7, seed=3, epoch=1)
    assert torch.equal(before, torch.get_rng_state())


def test_seeds_and_epochs_all_give_their_own_order():
    orders = {
        tuple(torch.cat(epoch_batches(40, 8, seed, epoch)).tolist()) for seed in (0, 1, 2**32) for epoch in range(3)
    }
    assert len(orders) == 9


def test_batch_size_cuts_the_same_order():
    assert torch.equal(torch.cat(epoch_batches(30, 7, 5, 2)), torch.cat(epoch_batches(30, 11, 5, 2)))


@given(st.integers(0, 40), st.one_of(st.none(), st.integers(1, 50)))
def test_micro_batches_add_up_to_the_batch(rows, micro_batch):
    batch = torch.arange(rows).flip(0)
    pieces = micro_batches(batch, micro_batch)
    assert [row for piece in pieces for row in piece.tolist()] == batch.tolist()
    assert all(0 < len(piece) <= (micro_batch or rows) for piece in pieces)
    assert len(pieces) == (0 if rows == 0 else 1 if micro_batch is None else -(-rows // micro_batch))
