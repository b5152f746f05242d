"""Memory that is taken again and again."""

import threading

import torch

from thintune.ops.workspace import Pool, Workspace


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


CPU = torch.device("cpu")


def test_a_pool_lends_again_what_came_back():
    pool = Pool()
    first = pool.take(40, 600, torch.float32, CPU)
    address = first.data_ptr()
    assert pool.take(40, 600, torch.float32, CPU).data_ptr() != address  # lent out
    pool.give_back(first)
    assert pool.bytes == 40 * 600 * 4
    smaller = pool.take(30, 600, torch.float32, CPU)
    assert smaller.data_ptr() == address
    assert smaller.shape == (30, 600)
    assert pool.take(30, 601, torch.float32, CPU).data_ptr() != address


def test_a_pool_lends_the_smallest_with_room_and_replaces_one_that_is_too_small():
    pool = Pool()
    lent = [pool.take(rows, 8, torch.int8, CPU) for rows in (100, 10, 50)]
    wanted = lent[2].data_ptr()
    pool.give_back(*lent)
    assert pool.take(20, 8, torch.int8, CPU).data_ptr() == wanted
    assert pool.bytes == 110 * 8
    pool.take(200, 8, torch.int8, CPU)
    assert pool.bytes in (10 * 8, 100 * 8)  # one of the free ones made room
    pool.clear()
    assert pool.bytes == 0
