"""The first bytes say what a file is; its name decides only where they do not."""

from __future__ import annotations

import gzip
import io
import json
import os
import struct
import tarfile
import zipfile

import pytest
import safetensors
import torch
from packaging.version import Version
from safetensors.torch import safe_open
from safetensors.torch import save as to_safetensors

from motionmerge.errors import CheckpointError, MotionMergeError, ShapeError
from motionmerge.io.weights import hash_weights, open_weights, save_weights
from motionmerge.merging.algebra.nodes import Checkpoint
from motionmerge.merging.compare import compare
from motionmerge.merging.merge import merge
from motionmerge.merging.recipes.recipe import Recipe
from motionmerge.tensors import DType

ENDINGS = (".safetensors", ".sft", ".ckpt", ".pt", ".pth", ".bin", "")
TENSORS = {"a.weight": torch.ones(2, 2)}


def torch_bytes(value=TENSORS, **options):
    buffer = io.BytesIO()
    torch.save(value, buffer, **options)
    return buffer.getvalue()


def archive_bytes(kind):
    buffer = io.BytesIO()
    if kind == "zip":
        with zipfile.ZipFile(buffer, "w") as archive:
            archive.writestr("model/readme.txt", "x" * 100)
    else:
        with tarfile.open(fileobj=buffer, mode="w") as archive:
            archive.addfile(tarfile.TarInfo("x"), io.BytesIO())
    return buffer.getvalue()


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"4d7a" * 16 + b"\nsize 28579\n"
OTHERS = {
    "empty": (b"", "empty"),
    "LFS": (LFS, "git-LFS pointer.* 28579 bytes"),
    "annex": (b"/annex/objects/SHA256E-s1--ab\n", "git-annex pointer"),
    "page": (b"<!DOCTYPE html><html><title>Sign in</title></html>", "web page"),
    "page after a mark": (b"\xef\xbb\xbf\n <HTML>..", "web page"),
    "XML": (b'<?xml version="1.0"?><Error><Code>AccessDenied</Code></Error>', "web page"),
    "answer": (b'{"error": "Repository not found"}', "JSON text, such as"),
    "index": (b'{"metadata": {}, "weight_map": {"a": "b.safetensors"}}', "index of shards"),
    "GGUF": (b"GGUF\x03\0\0\0" + bytes(64), "GGUF.*Fix: .*export loras"),
    "gzip": (gzip.compress(torch_bytes()), "archive .gzip"),
    "tar": (archive_bytes("tar"), "archive .tar"),
    "zip": (archive_bytes("zip"), "archive .zip"),
    "picture": (b"\x89PNG\r\n\x1a\n" + bytes(64), "picture"),
    "array": (b"\x93NUMPY\x01\0" + bytes(64), "NumPy"),
    "HDF5": (b"\x89HDF\r\n\x1a\n" + bytes(64), "HDF5"),
}


@pytest.mark.parametrize("ending", ENDINGS)
@pytest.mark.parametrize("kind", OTHERS)
def test_what_holds_no_weights_is_named_whatever_it_is_called(tmp_path, kind, ending):
    content, said = OTHERS[kind]
    path = tmp_path / f"model{ending}"
    path.write_bytes(content)
    for work in (open_weights, hash_weights):
        with pytest.raises(CheckpointError, match=f"(?s){said}") as caught:
            work(path)
        assert caught.value.fix
        assert "damaged" not in caught.value.message


@pytest.mark.parametrize("ending", ENDINGS)
def test_safetensors_are_read_under_every_name(tmp_path, ending):
    path = tmp_path / f"model{ending}"
    path.write_bytes(to_safetensors(TENSORS))
    with open_weights(path) as reader:
        assert torch.equal(reader.read("a.weight"), TENSORS["a.weight"])


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "pickle"])
@pytest.mark.parametrize("ending", ENDINGS)
def test_a_torch_file_is_read_under_every_name_but_one_that_promises_safetensors(
    tmp_path, ending, zipped
):
    path = tmp_path / f"model{ending}"
    path.write_bytes(torch_bytes(_use_new_zipfile_serialization=zipped))
    if ending == ".safetensors":
        with pytest.raises(CheckpointError, match=r"torch\.save.*\n.*Fix: .*trust"):
            open_weights(path)
        return
    with open_weights(path) as reader:
        assert torch.equal(reader.read("a.weight"), TENSORS["a.weight"])


class Code:
    def __reduce__(self):
        return os.mkdir, ("ran",)


@pytest.mark.parametrize("ending", ENDINGS)
def test_no_name_makes_a_pickle_run_code(tmp_path, monkeypatch, ending):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / f"model{ending}"
    path.write_bytes(torch_bytes({"a.weight": Code()}))
    with pytest.raises(CheckpointError, match="Fix"):
        open_weights(path)
    assert not (tmp_path / "ran").exists()


def test_a_pipe_is_refused_and_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "x.safetensors")
    with pytest.raises(CheckpointError, match="Fix"):
        open_weights(tmp_path / "x.safetensors")


# Headers that the official reader accepts


def file_of(path, header, data=b""):
    raw = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(raw)) + raw + data)
    return path


ENTRY = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}


@pytest.mark.parametrize(
    "header",
    [
        {"__metadata__": None, "a": ENTRY},
        {"__metadata__": {}, "a": ENTRY},
        {"a": {**ENTRY, "name": "x", "more": [1]}},
    ],
)
def test_a_header_is_read_that_the_official_reader_reads(tmp_path, header):
    path = file_of(tmp_path / "x.safetensors", header, struct.pack("<f", 2.5))
    with safe_open(path, "pt") as official, open_weights(path) as ours:
        assert list(official.keys()) == ours.keys() == ["a"]
        assert torch.equal(official.get_tensor("a"), ours.read("a"))


COPIED = [dtype for dtype in DType if dtype.is_only_copied]


def copied_file(path, dtype, *, fill=0, weight=0.0, count=16):
    size = dtype.bits * count // 8
    header = {
        "w": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]},
        "odd": {"dtype": dtype.code, "shape": [count], "data_offsets": [16, 16 + size]},
    }
    return file_of(path, header, struct.pack("<4f", *[weight] * 4) + bytes([fill]) * size)


@pytest.mark.parametrize("dtype", COPIED)
def test_a_tensor_that_nothing_computes_with_is_listed_and_copied(tmp_path, dtype):
    for name, weight in (("base", 1.0), ("tuned", 3.0)):
        copied_file(tmp_path / f"{name}.safetensors", dtype, fill=7, weight=weight)
    recipe = Recipe.parse(
        "inputs: {base: base.safetensors, tuned: tuned.safetensors}\n"
        "experts: {m: base + 0.5 * (tuned - base)}",
        folder=tmp_path,
    )
    merge(recipe, tmp_path / "out")
    with open_weights(tmp_path / "out/m.safetensors") as reader:
        assert reader.dtype("odd") is dtype
        assert reader.read("w").tolist() == [2.0] * 4
        found = bytearray(dtype.bits * 2)
        reader.read_into("odd", 0, memoryview(found))
    assert found == bytes([7]) * len(found)
    if Version(safetensors.__version__) >= Version("0.8"):  # older ones know fewer dtypes
        with safe_open(tmp_path / "out/m.safetensors", "pt") as official:
            assert set(official.keys()) == {"w", "odd"}


@pytest.mark.parametrize("dtype", COPIED)
def test_a_difference_of_tensors_that_nothing_computes_with_is_refused_by_name(tmp_path, dtype):
    base = copied_file(tmp_path / "base.safetensors", dtype, fill=7)
    tuned = copied_file(tmp_path / "tuned.safetensors", dtype, fill=8)
    recipe = Recipe.parse(
        "inputs: {base: base.safetensors, tuned: tuned.safetensors}\n"
        "experts: {m: base + 0.5 * (tuned - base)}",
        folder=tmp_path,
    )
    for work in (lambda: merge(recipe, tmp_path / "out"), lambda: compare(base, tuned)):
        with pytest.raises(ShapeError, match=rf"`odd` is {dtype.short_name}") as caught:
            work()
        assert caught.value.fix


def test_an_unknown_dtype_is_named_and_the_file_not_called_damaged(tmp_path):
    entry = {"dtype": "F5_NEW", "shape": [8], "data_offsets": [0, 5]}
    path = file_of(tmp_path / "x.safetensors", {"a": entry}, bytes(5))
    with pytest.raises(CheckpointError, match="F5_NEW") as caught:
        open_weights(path)
    assert "whole" not in str(caught.value) and "again" not in str(caught.value).lower()


def test_a_tensor_that_ends_within_a_byte_is_refused_as_by_the_official_reader(tmp_path):
    entry = {"dtype": "F4", "shape": [3], "data_offsets": [0, 2]}
    path = file_of(tmp_path / "x.safetensors", {"a": entry}, bytes(2))
    with pytest.raises(CheckpointError, match="within a byte"):
        open_weights(path)
    with pytest.raises(Exception, match=r"(?i)invalid|misaligned"), safe_open(path, "pt"):
        pass


# Tensors without values


def special_tensors():
    quantised = torch.quantize_per_tensor(torch.ones(2, 2), 0.1, 0, torch.qint8)
    return {
        "meta": torch.empty(2, 2, device="meta"),
        "sparse": torch.eye(2).to_sparse(),
        "csr": torch.eye(2).to_sparse_csr(),
        "quantised": quantised,
        "nested": torch.nested.nested_tensor([torch.ones(1), torch.ones(2)]),
    }


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["meta", "sparse", "csr", "quantised", "nested"])
def test_a_tensor_that_holds_no_plain_numbers_is_refused_with_name_and_count(tmp_path, kind):
    tensor = special_tensors()[kind]
    path = tmp_path / "x.pt"
    torch.save({"a.weight": tensor, "b.weight": torch.ones(2), "c.weight": tensor}, path)
    with pytest.raises(CheckpointError, match="Fix") as caught:
        open_weights(path)
    if "cannot be read as a torch checkpoint" not in caught.value.message:
        assert "2 of its 3" in caught.value.message and "`a.weight`" in caught.value.message


@pytest.mark.parametrize("ending", [".safetensors", ".pt"])
@pytest.mark.parametrize("shape", [(0,), (0, 4), (4, 0)])
def test_weights_without_entries_are_refused_with_name_and_count(tmp_path, ending, shape):
    tensors = {"a.weight": torch.ones(0).reshape(shape), "b.weight": torch.ones(2)}
    path = tmp_path / f"x{ending}"
    path.write_bytes(to_safetensors(tensors) if ending == ".safetensors" else torch_bytes(tensors))
    with pytest.raises(CheckpointError, match=r"1 of the 2 tensors .* `a\.weight`.*no values"):
        open_weights(path)
    with pytest.raises(MotionMergeError, match="no values"):
        compare(path, Checkpoint.load(path))


# Links of the hub's cache, and variants


def test_a_link_counts_by_its_own_name_and_a_broken_one_is_named(tmp_path):
    (tmp_path / "blobs").mkdir()
    (tmp_path / "blobs/0a1b").write_bytes(to_safetensors(TENSORS))
    link = tmp_path / "model.safetensors"
    link.symlink_to("blobs/0a1b")
    assert open_weights(link).keys() == ["a.weight"]
    assert Checkpoint.load(link).anchor.origin == link
    (tmp_path / "blobs/0a1b").unlink()
    with pytest.raises(CheckpointError, match="a link to blobs/0a1b, which is not there"):
        open_weights(link)


def save_variant(folder, variant, *, number=2):
    weight_map = {}
    for index in range(1, number + 1):
        name = f"diffusion_pytorch_model.{variant}-{index:05}-of-{number:05}.safetensors"
        save_weights(folder / name, {f"{variant}.{index}": torch.zeros(2)})
        weight_map[f"{variant}.{index}"] = name
    index = {"metadata": {}, "weight_map": weight_map}
    path = folder / f"diffusion_pytorch_model.safetensors.index.{variant}.json"
    path.write_text(json.dumps(index))


def test_shards_of_a_variant_are_read_where_they_are_alone(tmp_path):
    save_variant(tmp_path, "fp16")
    assert open_weights(tmp_path).keys() == ["fp16.1", "fp16.2"]
    save_variant(tmp_path, "bf16")
    with pytest.raises(CheckpointError, match="2 shard indices"):
        open_weights(tmp_path)
    save_weights(tmp_path / "diffusion_pytorch_model.safetensors", {"plain": torch.ones(1)})
    assert open_weights(tmp_path).keys() == ["plain"]
