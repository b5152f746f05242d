"""Memory that is taken again and again."""

import threading

import torch

from thintune.ops.workspace import Workspace


def test_a_name_keeps_its_memory_and_grows_when_it_must():
    space, like = Workspace(), torch.zeros(1)
    first = space.take("a", (4, 5), like)
    assert space.take("a", (2, 3), like).data_ptr() == first.data_ptr()
    assert space.take("b", (4, 5), like).data_ptr() != first.data_ptr()
    assert space.take("a", (4, 5), like.double()).dtype == torch.float64
    assert space.bytes == 20 * 4 * 2 + 20 * 8
    assert space.take("a", (30,), like).shape == (30,)
    assert space.bytes == 30 * 4 + 20 * 4 + 20 * 8
    space.clear()
    assert space.bytes == 0


def test_threads_do_not_share():
    space, found = Workspace(), []
    mine = space.take("a", (4,), torch.zeros(1)).data_ptr()
    thread = threading.Thread(target=lambda: found.append(space.take("a", (4,), torch.zeros(1)).data_ptr()))
    thread.start()
    thread.join()
    assert found != [mine]
