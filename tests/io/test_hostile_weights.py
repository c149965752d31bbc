"""Damaged and hostile weight files are refused with a message, whatever they hold."""

from __future__ import annotations

import io
import json
import os
import pickle
import struct
from functools import cache

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from motionmerge.errors import CheckpointError
from motionmerge.io.weights import open_weights, save_weights


def build_file(path, header, data=b"", *, header_size=None):
    """Write a safetensors file by hand; `header` may be bytes."""
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    size = len(raw) if header_size is None else header_size
    path.write_bytes(struct.pack("<Q", size) + raw + data)
    return path


def entry(dtype="F32", shape=(1,), offsets=(0, 4)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


# safetensors


@pytest.mark.parametrize(
    ("header", "data", "complaint"),
    [
        (b"not json", b"", "not JSON"),
        (b"[]", b"", "not a JSON object"),
        (b"\xff\xfe", b"", "not JSON"),
        (b"[" * 100_000, b"", "not JSON"),
        (b'{"a": ' + b"9" * 5000 + b"}", b"", "not JSON"),
        (b'{"a": {}, "a": {}}', b"", "twice"),
        (b'{"a": {"dtype": "F32", "dtype": "F16"}}', b"", "twice"),
        ({"__metadata__": {"a": 1}}, b"", "metadata"),
        ({"__metadata__": []}, b"", "metadata"),
        ({"a": 3}, b"", "its entry"),
        ({"a": {"dtype": "F32"}}, b"", "its entry"),
        ({"a": entry(dtype="F31")}, b"1234", "Unknown dtype code"),
        ({"a": entry(dtype=["F32"])}, b"1234", "dtype is not text"),
        ({"a": entry(shape=(-1,))}, b"1234", "impossible"),
        ({"a": entry(shape=(1.0,))}, b"1234", "impossible"),
        ({"a": entry(shape=(True,))}, b"1234", "impossible"),
        ({"a": entry(shape=(0, 2**59, 2**59), offsets=(0, 0))}, b"", "impossible"),
        ({"a": entry(shape=(1,) * 65)}, b"1234", "impossible"),
        ({"a": entry(offsets=(-4, 0))}, b"1234", "impossible"),
        ({"a": entry(offsets=(4, 0))}, b"1234", "impossible"),
        ({"a": entry(offsets=(0, 4, 8))}, b"1234", "impossible"),
        ({"a": entry(offsets=(0, 3))}, b"123", "needs 4 bytes"),
        ({"a": entry(shape=(2**40,), offsets=(0, 2**42))}, b"1234", "cut off"),
        ({"a": entry(offsets=(0, 4)), "b": entry(offsets=(0, 4))}, b"1234", "overlaps"),
        ({"a": entry(), "b": entry(offsets=(2, 6))}, b"123456", "overlaps"),
        ({"a": entry(offsets=(4, 8))}, b"12345678", "follows a hole"),
        ({"a": entry()}, b"12345", "belong to no tensor"),
        ({"a": entry()}, b"123", "cut off"),
    ],
)  # fmt: skip
def test_a_header_that_lies_is_refused(tmp_path, header, data, complaint):
    path = build_file(tmp_path / "x.safetensors", header, data)
    with pytest.raises(CheckpointError, match="Fix:") as refused:
        open_weights(path)
    assert complaint in str(refused.value)
    assert len(str(refused.value)) < 600


@pytest.mark.parametrize("size", [3, 2**40, 2**63, 101_000_000])
def test_a_header_longer_than_the_file_or_the_limit_is_refused(tmp_path, size):
    path = build_file(tmp_path / "x.safetensors", b"{", header_size=size)
    with pytest.raises(CheckpointError, match="claims"):
        open_weights(path)


def test_every_truncation_of_a_file_is_refused(tmp_path, tensors):
    path = tmp_path / "x.safetensors"
    save_weights(path, tensors)
    whole = path.read_bytes()
    for size in range(len(whole)):
        path.write_bytes(whole[:size])
        with pytest.raises(CheckpointError):
            open_weights(path)


@settings(
    max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_no_damage_to_a_header_crashes_the_reader(tmp_path, data):
    path = tmp_path / "x.safetensors"
    save_file({"a": torch.ones(2), "b": torch.ones(3).half()}, path)
    damaged = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        position = data.draw(st.integers(0, len(damaged) - 1))
        damaged[position] = data.draw(st.integers(0, 255))
    path.write_bytes(damaged)
    try:
        with open_weights(path) as reader:
            for name in reader.keys():  # noqa: SIM118 (a method that lists)
                assert tuple(reader.read(name).shape) == reader.shape(name)
    except CheckpointError as error:
        assert "Fix:" in str(error)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=8,
)
entries = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "BF16", "I64", "XX"]) | json_values,
        "shape": st.lists(st.integers(-1, 2**62), max_size=3) | json_values,
        "data_offsets": st.lists(st.integers(-1, 64), min_size=2, max_size=2) | json_values,
    }
)


@settings(
    max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(header=st.dictionaries(st.text(max_size=8), entries | json_values, max_size=3))
def test_no_header_crashes_the_reader(tmp_path, header):
    path = build_file(tmp_path / "x.safetensors", header, bytes(16))
    try:
        open_weights(path).close()
    except CheckpointError as error:
        assert "Fix:" in str(error)


# Pickles


class Malicious:
    def __reduce__(self):
        return os.system, ("true",)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_a_pickle_that_could_run_code_is_refused(tmp_path):
    torch.save({"state_dict": {"a": Malicious()}}, tmp_path / "zip.ckpt")
    (tmp_path / "bare.pt").write_bytes(pickle.dumps(Malicious()))
    for name in ("zip.ckpt", "bare.pt"):
        with pytest.raises(CheckpointError, match=r"Fix: .*safetensors"):
            open_weights(tmp_path / name)


@pytest.mark.parametrize(
    "content", [b"", b"PK", b"PK\x03\x04garbage", b"\x80\x02garbage", b"hello"]
)
def test_a_damaged_pickle_is_refused(tmp_path, content):
    path = tmp_path / "x.ckpt"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match="Fix"):
        open_weights(path)


@pytest.mark.parametrize(
    "content",
    [torch.ones(2), [torch.ones(2)], {"a": "text"}, {3: torch.ones(1)},
     {"a": torch.eye(2).to_sparse()}],
)  # fmt: skip
def test_a_ckpt_without_a_plain_state_dict_is_refused(tmp_path, content):
    torch.save(content, tmp_path / "x.ckpt")
    with pytest.raises(CheckpointError, match="Fix"):
        open_weights(tmp_path / "x.ckpt")


@cache  # as the older format holds addresses, of any length
def saved(*, zipped: bool) -> bytes:
    """Return a file of one tensor."""
    file = io.BytesIO()
    torch.save({"a": torch.ones(2)}, file, _use_new_zipfile_serialization=zipped)
    return file.getvalue()


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@settings(
    max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_no_damage_to_a_pickle_crashes_the_reader(tmp_path, data):
    path = tmp_path / "x.ckpt"
    damaged = bytearray(saved(zipped=data.draw(st.booleans())))
    for _ in range(data.draw(st.integers(1, 4))):
        damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(damaged[: data.draw(st.integers(0, len(damaged)))])
    try:
        open_weights(path).close()
    except CheckpointError as error:
        assert "Fix:" in str(error)
