"""A pair of safetensors and JSON is there in full or not at all."""

import errno
import json
import os
import random

import pytest
import torch
from safetensors import safe_open

from thintune.errors import CheckpointError, OutputError
from thintune.io import files, read_tensors, tensors, write_tensors


def odd_tensors():
    """Kinds and sizes that leave every following tensor off its natural alignment."""
    generator = torch.Generator().manual_seed(0)
    return {
        "mask": torch.tensor([True, False, True]),
        "float": torch.randn(3, 5, generator=generator),
        "scalar": torch.tensor(2.5),
        "half": torch.randn(7, generator=generator).bfloat16(),
        "count": torch.tensor(2**40 + 1),
        "byte": torch.arange(5, dtype=torch.uint8),
        "small": torch.tensor([-3], dtype=torch.int8),
        "short": torch.tensor([-300], dtype=torch.int16),
        "double": torch.randn(2, 1, 3, dtype=torch.float64, generator=generator),
        "empty": torch.empty(0, 4),
        "turned": torch.randn(4, 6, generator=generator).T,
        "nan": torch.tensor([float("nan"), float("inf"), -0.0]),
    }


def same(one, other):
    return one.dtype == other.dtype and one.shape == other.shape and repr(one.tolist()) == repr(other.tolist())


def put(folder, value, **document):
    write_tensors(folder, "pair", {"x": torch.full((50,), float(value))}, document)


def value(folder):
    return float(read_tensors(folder, "pair").load()["x"][0])


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_every_kind_of_tensor_comes_back_bit_for_bit(tmp_path):
    wanted = odd_tensors()
    write_tensors(tmp_path, "pair", wanted, {"note": "ä"})
    stored = read_tensors(tmp_path, "pair")
    found = stored.load()
    assert stored.document["note"] == "ä" and found.keys() == wanted.keys()
    assert all(same(found[name], tensor) for name, tensor in wanted.items())
    assert all(tensor.data_ptr() % tensor.element_size() == 0 for tensor in found.values())


def test_other_readers_of_safetensors_find_the_same_values(tmp_path):
    wanted = odd_tensors()
    write_tensors(tmp_path, "pair", wanted, {})
    with safe_open(read_tensors(tmp_path, "pair").path, framework="pt") as stream:
        assert set(stream.keys()) == wanted.keys()
        assert all(same(stream.get_tensor(name).clone(), tensor) for name, tensor in wanted.items())


def test_values_are_read_into_memory_of_their_own(tmp_path):
    put(tmp_path, 1)
    stored = read_tensors(tmp_path, "pair")
    one = stored.load()["x"]
    stored.path.unlink()
    assert float(one.sum()) == 50.0


@pytest.mark.parametrize("bad", [torch.zeros(2, dtype=torch.complex64), torch.empty(2, device="meta")])
def test_what_cannot_be_stored_is_named_before_anything_is_written(bad, tmp_path):
    with pytest.raises(CheckpointError, match=r"blocks\.3\.odd"):
        write_tensors(tmp_path / "new", "pair", {"x": torch.zeros(2), "blocks.3.odd": bad}, {})
    assert not (tmp_path / "new").exists()


def test_a_new_pair_removes_the_one_before_and_what_killed_writers_left(tmp_path):
    put(tmp_path, 1)
    for name in (".pair.999999.tmp", ".pair.json.999999.tmp", "pair-0123456789abcdef.safetensors"):
        (tmp_path / name).write_bytes(b"left")
    (tmp_path / "other-0123.safetensors").write_bytes(b"not ours")
    put(tmp_path, 2)
    assert value(tmp_path) == 2
    file = read_tensors(tmp_path, "pair").path.name
    assert names(tmp_path) == sorted(["other-0123.safetensors", file, "pair.json"])


def test_writing_the_same_tensors_again_keeps_them(tmp_path):
    put(tmp_path, 1, step=1)
    put(tmp_path, 1, step=2)
    assert value(tmp_path) == 1 and read_tensors(tmp_path, "pair").document["step"] == 2
    assert len(names(tmp_path)) == 2


@pytest.mark.parametrize("call", [1, 2])
def test_a_file_system_that_refuses_a_rename_leaves_the_pair_before(call, tmp_path, monkeypatch):
    put(tmp_path, 1)
    before, calls, replace = names(tmp_path), [], os.replace

    def refuse(source, target):
        calls.append(target)
        if len(calls) == call:
            raise OSError(errno.EROFS, "Read-only file system")
        replace(source, target)

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(OutputError, match="Read-only file system"):
        put(tmp_path, 2)
    monkeypatch.undo()
    assert len(calls) == call and value(tmp_path) == 1 and names(tmp_path) == before
    put(tmp_path, 3)
    assert value(tmp_path) == 3


@pytest.mark.parametrize("where", ["tensors", "document"])
def test_a_full_disk_leaves_the_pair_before(where, tmp_path, monkeypatch):
    put(tmp_path, 1)
    before = names(tmp_path)

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    if where == "tensors":
        monkeypatch.setattr(tensors.os, "fsync", full)
    else:
        monkeypatch.setattr(files, "_write", full)
    with pytest.raises(OutputError, match="No space left"):
        put(tmp_path, 2)
    assert value(tmp_path) == 1 and names(tmp_path) == before


class Killed(BaseException):
    """Stands for the end of the process: nothing after it runs."""


def test_a_kill_between_the_two_renames_leaves_the_pair_before(tmp_path, monkeypatch):
    put(tmp_path, 1)

    def die(*_):
        raise Killed

    monkeypatch.setattr(tensors, "write_text", die)
    monkeypatch.setattr(tensors, "_remove_leftovers", lambda *_: None)
    with pytest.raises(Killed):
        put(tmp_path, 2)
    assert len(list(tmp_path.glob("*.safetensors"))) == 2
    assert value(tmp_path) == 1
    monkeypatch.undo()
    put(tmp_path, 3)
    assert value(tmp_path) == 3 and len(names(tmp_path)) == 2


def test_a_kill_right_after_the_second_rename_leaves_the_new_pair(tmp_path, monkeypatch):
    put(tmp_path, 1)

    def die(*_):
        raise Killed

    monkeypatch.setattr(tensors, "_remove_leftovers", die)
    with pytest.raises(Killed):
        put(tmp_path, 2)
    assert value(tmp_path) == 2


def test_any_flipped_or_missing_byte_is_noticed(tmp_path):
    put(tmp_path, 1)
    path = read_tensors(tmp_path, "pair").path
    data, rng = path.read_bytes(), random.Random(0)
    for position in [0, len(data) - 1, *rng.sample(range(len(data)), 10)]:
        broken = bytearray(data)
        broken[position] ^= 1 << rng.randrange(8)
        path.write_bytes(broken)
        with pytest.raises(CheckpointError, match="wrong checksum"):
            read_tensors(tmp_path, "pair")
    for length in (0, 7, len(data) // 2, len(data) - 1):
        path.write_bytes(data[:length])
        with pytest.raises(CheckpointError, match=f"found {length}; the file is truncated"):
            read_tensors(tmp_path, "pair")
    path.unlink()
    with pytest.raises(CheckpointError, match=r"missing; pair\.json names it"):
        read_tensors(tmp_path, "pair")
    path.write_bytes(data)
    assert value(tmp_path) == 1


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "expected a JSON document"),
        ('{"tensors": {"file"', "expected a JSON document"),
        ("[]", "expected a JSON object, got list"),
        ("{}", "expected the entry 'tensors'"),
        ('{"tensors": {"file": "x"}}', "expected the entry 'tensors'"),
        ('{"tensors": {"file": "../../x", "sha256": "", "bytes": 0}}', "missing"),
    ],
)
def test_a_damaged_document_is_named(text, said, tmp_path):
    put(tmp_path, 1)
    (tmp_path / "pair.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"pair\.json|missing") as caught:
        read_tensors(tmp_path, "pair")
    assert said in str(caught.value)


def test_a_file_that_is_no_safetensors_file_in_spite_of_its_checksum(tmp_path):
    put(tmp_path, 1)
    path = read_tensors(tmp_path, "pair").path
    path.write_bytes(b"hello")
    document = json.loads((tmp_path / "pair.json").read_text())
    digest = "2cf24dba5fb0a30e26e83b2ac5b9e29e1b161e5c1fa7425e73043362938b9824"
    document["tensors"] |= {"sha256": digest, "bytes": 5}
    (tmp_path / "pair.json").write_text(json.dumps(document))
    with pytest.raises(CheckpointError, match="truncated or no safetensors file"):
        read_tensors(tmp_path, "pair").load()


def test_a_folder_that_is_missing_or_a_file_or_not_writable(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="nothing there"):
        read_tensors(tmp_path / "none", "pair")
    with pytest.raises(CheckpointError, match="found a file"):
        read_tensors(tmp_path / "file", "pair")
    with pytest.raises(OutputError, match="expected a folder that can be written to"):
        put(tmp_path / "file" / "deeper", 1)


def test_an_atomic_text_file_is_whole_or_as_it_was(tmp_path, monkeypatch):
    path = tmp_path / "record.json"
    files.write_text(path, "one")

    def half(target, text):
        target.write_text(text[: len(text) // 2])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files, "_write", half)
    with pytest.raises(OutputError, match=r"record\.json: could not be written: No space left"):
        files.write_text(path, "two and more")
    assert path.read_text() == "one" and names(tmp_path) == ["record.json"]
