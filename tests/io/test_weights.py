"""Weights are read lazily from every usual form; damaged and hostile files are refused."""

from __future__ import annotations

import json
import struct
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from motionmerge.errors import CheckpointError, ShapeError
from motionmerge.io.weights import hash_weights, open_weights, save_weights, write_weights


def assert_same(reader, tensors):
    assert sorted(reader.keys()) == sorted(tensors)
    for name, tensor in tensors.items():
        read = reader.read(name)
        assert read.dtype == reader.dtype(name).torch == tensor.dtype
        assert tuple(read.shape) == reader.shape(name) == tuple(tensor.shape)
        assert torch.equal(read.view(-1).view(torch.uint8), tensor.view(-1).view(torch.uint8))


# Reading and writing what is whole


def test_what_is_saved_is_read_back(tmp_path, tensors):
    path = tmp_path / "new" / "model.safetensors"
    save_weights(path, tensors, metadata={"recipe": "größer"})
    with open_weights(path) as reader:
        assert_same(reader, tensors)
        assert reader.metadata == {"recipe": "größer"}
        assert reader.num_parameters == 3 + 18 + 5 + 1 + 0 + 3


def test_our_files_are_read_by_the_safetensors_library_and_the_reverse(tmp_path, tensors):
    save_weights(tmp_path / "ours.safetensors", tensors)
    theirs = load_file(tmp_path / "ours.safetensors")
    assert all(
        torch.equal(theirs[k].view(-1).view(torch.uint8), v.view(-1).view(torch.uint8))
        for k, v in tensors.items()
    )
    save_file(tensors, tmp_path / "theirs.safetensors", metadata={"a": "b"})
    with open_weights(tmp_path / "theirs.safetensors") as reader:
        assert_same(reader, tensors)
        assert reader.metadata == {"a": "b"}


def test_a_read_tensor_is_an_owned_copy(tmp_path):
    path = tmp_path / "x.safetensors"
    save_weights(path, {"a": torch.ones(3)})
    with open_weights(path) as reader:
        reader.read("a").zero_()
        assert torch.equal(reader.read("a"), torch.ones(3))


def test_a_transposed_view_is_saved_as_it_reads(tmp_path):
    tensor = torch.arange(6.0).view(2, 3).T
    save_weights(tmp_path / "x.safetensors", {"a": tensor})
    assert torch.equal(open_weights(tmp_path / "x.safetensors").read("a"), tensor)


def test_tensors_may_come_in_any_order_and_keep_the_order_of_their_specs(tmp_path):
    tensors = {name: torch.full((2,), float(i)) for i, name in enumerate("abc")}
    specs = dict.fromkeys("abc", (torch.float32, (2,)))
    write_weights(tmp_path / "x.safetensors", list(tensors.items())[::-1], specs=specs)
    with open_weights(tmp_path / "x.safetensors") as reader:
        assert reader.keys() == ["a", "b", "c"]
        assert_same(reader, tensors)


def test_the_header_ends_at_a_multiple_of_eight_bytes(tmp_path):
    for length in range(9):
        path = tmp_path / "x.safetensors"
        save_weights(path, {"a" * (length + 1): torch.ones(1)})
        assert struct.unpack("<Q", path.read_bytes()[:8])[0] % 8 == 0


@pytest.mark.parametrize("wrapper", [None, "state_dict", "module", "model", "generator_ema"])
@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_a_ckpt_is_read_through_its_wrapper(tmp_path, tensors, wrapper, zipped):
    if not zipped:
        del tensors["fp8"]  # torch itself cannot read it from its legacy format
    content = tensors if wrapper is None else {"epoch": 3, wrapper: tensors}
    path = tmp_path / "model.ckpt"
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    with open_weights(path) as reader:
        assert_same(reader, tensors)


def test_a_ckpt_with_weights_and_their_average_is_refused_by_both_names(tmp_path, tensors):
    torch.save({"generator": tensors, "generator_ema": tensors, "step": 3}, tmp_path / "a.pt")
    with pytest.raises(CheckpointError, match="several models: `generator`, `generator_ema`"):
        open_weights(tmp_path / "a.pt")


# Folders


def save_shards(folder, tensors, *, stem="diffusion_pytorch_model"):
    names = list(tensors)
    weight_map = {}
    for i, part in enumerate((names[:2], names[2:])):
        shard = f"{stem}-{i + 1:05}-of-00002.safetensors"
        save_file({name: tensors[name] for name in part}, folder / shard)
        weight_map.update(dict.fromkeys(part, shard))
    index = folder / f"{stem}.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return index


@pytest.mark.parametrize("stem", ["diffusion_pytorch_model", "model", "other"])
def test_a_sharded_folder_is_one_model(tmp_path, tensors, stem):
    save_shards(tmp_path, tensors, stem=stem)
    with open_weights(tmp_path) as reader:
        assert_same(reader, tensors)
        assert len(reader.files) == 2


def test_a_folder_with_one_file_needs_no_index(tmp_path, tensors):
    save_weights(tmp_path / "whatever.safetensors", tensors)
    assert_same(open_weights(tmp_path), tensors)


def test_the_usual_name_wins_over_a_variant(tmp_path):
    save_weights(tmp_path / "model.safetensors", {"a": torch.ones(1)})
    save_weights(tmp_path / "model.fp16.safetensors", {"a": torch.ones(1).half()})
    assert open_weights(tmp_path).dtype("a").torch == torch.float32


def test_several_files_without_an_index_are_refused(tmp_path):
    for name in "xy":
        save_weights(tmp_path / f"{name}.safetensors", {name: torch.ones(1)})
    with pytest.raises(CheckpointError, match="Fix: Name the file"):
        open_weights(tmp_path)


def test_a_pipeline_folder_points_at_its_parts(tmp_path):
    save_weights(tmp_path / "unet" / "model.safetensors", {"a": torch.ones(1)})
    with pytest.raises(CheckpointError, match="parts: unet"):
        open_weights(tmp_path)


def test_an_empty_folder_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="no safetensors file"):
        open_weights(tmp_path)


@pytest.mark.parametrize(
    "shard", ["../secret.safetensors", "/etc/x.safetensors", "a/b.safetensors", "..\\x.safetensors"]
)
def test_an_index_that_points_outside_its_folder_is_refused(tmp_path, shard):
    save_weights(tmp_path / "secret.safetensors", {"a": torch.ones(1)})
    folder = tmp_path / "model"
    folder.mkdir()
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": shard}}))
    with pytest.raises(CheckpointError, match="outside its folder"):
        open_weights(folder)


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[]",
        "{}",
        '{"weight_map": []}',
        '{"weight_map": {}}',
        '{"weight_map": {"a": 3}}',
        '{"weight_map": {"a": "missing.safetensors"}}',
        "[" * 100_000,
    ],
)
def test_a_bad_index_is_refused(tmp_path, content):
    (tmp_path / "model.safetensors.index.json").write_text(content)
    with pytest.raises(CheckpointError, match="Fix"):
        open_weights(tmp_path)


def test_a_tensor_that_the_index_promises_must_be_there(tmp_path, tensors):
    index = save_shards(tmp_path, tensors)
    content = json.loads(index.read_text())
    content["weight_map"]["more.weight"] = next(iter(content["weight_map"].values()))
    index.write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=r"lack.*more\.weight"):
        open_weights(tmp_path)


def test_a_tensor_in_two_shards_is_refused(tmp_path):
    weight_map = {}
    for i in (1, 2):
        save_weights(tmp_path / f"m-{i}.safetensors", {"a": torch.ones(1), f"b{i}": torch.ones(1)})
        weight_map[f"b{i}"] = f"m-{i}.safetensors"
    (tmp_path / "m.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(CheckpointError, match="is in both"):
        open_weights(tmp_path)


# What is not there


def test_a_missing_file_names_its_neighbours(tmp_path):
    save_weights(tmp_path / "tuned.safetensors", {"a": torch.ones(1)})
    with pytest.raises(CheckpointError, match=r"holds tuned\.safetensors"):
        open_weights(tmp_path / "tunde.safetensors")


def test_an_unknown_ending_is_refused(tmp_path):
    (tmp_path / "x.dat").write_bytes(b"data\0")
    with pytest.raises(CheckpointError, match=r"unknown ending `\.dat`"):
        open_weights(tmp_path / "x.dat")


def test_an_unknown_tensor_is_refused(tmp_path):
    save_weights(tmp_path / "x.safetensors", {"a": torch.ones(1)})
    with open_weights(tmp_path / "x.safetensors") as reader:
        assert "a" in reader and "b" not in reader
        for ask in (reader.read, reader.shape, reader.dtype):
            with pytest.raises(CheckpointError, match="no tensor `b`"):
                ask("b")


# Nothing half-written


def failing(tensors):
    yield next(iter(tensors.items()))
    raise RuntimeError("the merge failed")


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "x.safetensors"
    save_weights(path, {"old": torch.ones(1)})
    tensors = {"a": torch.ones(2), "b": torch.ones(2)}
    specs = dict.fromkeys(tensors, (torch.float32, (2,)))
    with pytest.raises(RuntimeError):
        write_weights(path, failing(tensors), specs=specs)
    assert [p.name for p in tmp_path.iterdir()] == ["x.safetensors"]
    assert open_weights(path).keys() == ["old"]


@pytest.mark.parametrize(
    ("pairs", "error"),
    [
        ([], CheckpointError),
        ([("a", torch.ones(2)), ("a", torch.ones(2))], CheckpointError),
        ([("b", torch.ones(2))], CheckpointError),
        ([("a", torch.ones(3))], ShapeError),
        ([("a", torch.ones(2).half())], ShapeError),
    ],
    ids=["missing", "twice", "unknown", "shape", "dtype"],
)
def test_tensors_that_differ_from_their_specs_are_refused(tmp_path, pairs, error):
    with pytest.raises(error, match="Fix"):
        write_weights(tmp_path / "x.safetensors", pairs, specs={"a": (torch.float32, (2,))})
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="Cannot write"):
        save_weights(tmp_path / "file" / "x.safetensors", {"a": torch.ones(1)})


def test_a_complex_tensor_is_refused_before_anything_is_written(tmp_path):
    with pytest.raises(CheckpointError, match="complex128"):
        save_weights(tmp_path / "x.safetensors", {"a": torch.ones(1, dtype=torch.complex128)})
    assert not list(tmp_path.iterdir())


# Hashes


def test_the_hash_is_that_of_the_bytes(tmp_path):
    path = tmp_path / "x.safetensors"
    save_weights(path, {"a": torch.ones(1)})
    before = hash_weights(path)
    assert before.startswith("sha256:") and len(before) == 7 + 64
    save_weights(path, {"a": torch.ones(1)})
    assert hash_weights(path) == before
    save_weights(path, {"a": torch.zeros(1)})
    assert hash_weights(path) != before


def test_the_hash_of_a_folder_covers_every_shard(tmp_path, tensors):
    save_shards(tmp_path, tensors)
    before = hash_weights(tmp_path)
    (tmp_path / "README.md").write_text("not weights")
    assert hash_weights(tmp_path) == before
    shard = next(tmp_path.glob("*-00002-of-*"))
    shard.write_bytes(shard.read_bytes() + b"x")
    assert hash_weights(tmp_path) != before


@pytest.mark.skipif(sys.platform != "linux", reason="blocks are reserved on Linux only")
def test_a_disk_that_cannot_hold_the_file_is_noticed_before_anything_is_written(tmp_path):
    specs = {"huge": (torch.float32, (2**42,))}
    with pytest.raises(CheckpointError, match=r"No space|too large|never came"):
        write_weights(tmp_path / "huge.safetensors", [], specs=specs)
    assert not list(tmp_path.iterdir())
