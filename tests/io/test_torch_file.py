"""What we write tensor by tensor, `torch.load` reads."""

from __future__ import annotations

import gc
import weakref
import zipfile

import pytest
import torch

from motionmerge.errors import CheckpointError, ShapeError
from motionmerge.io.torch_file import write_torch_file
from motionmerge.io.weights import open_weights

DTYPES = (
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32,
    torch.int16, torch.int8, torch.uint8, torch.bool,
)  # fmt: skip


def tensors():
    state = {f"of.{dtype}": torch.arange(12).reshape(3, 4).to(dtype) for dtype in DTYPES}
    return state | {"scalar": torch.tensor(2.5), "empty": torch.empty(0, 3), "ü": torch.ones(7)}


def write(path, state):
    specs = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in state.items()}
    write_torch_file(path, specs, read=state.__getitem__)


@pytest.mark.parametrize("mmap", [False, True])
def test_torch_reads_the_same_tensors(tmp_path, mmap):
    state = tensors()
    write(tmp_path / "model.ckpt", state)
    loaded = torch.load(tmp_path / "model.ckpt", weights_only=True, mmap=mmap)["state_dict"]
    assert list(loaded) == list(state)
    for name, tensor in state.items():
        assert loaded[name].dtype == tensor.dtype and torch.equal(loaded[name], tensor)
        assert loaded[name].is_contiguous()
        assert loaded[name].data_ptr() % 64 == 0 or not mmap or not tensor.numel()


def test_other_readers_find_a_whole_archive(tmp_path):
    write(tmp_path / "model.ckpt", tensors())
    with zipfile.ZipFile(tmp_path / "model.ckpt") as archive:
        assert archive.testzip() is None
    with open_weights(tmp_path / "model.ckpt") as reader:
        assert list(reader.keys()) == list(tensors())


def test_the_same_tensors_give_the_same_bytes(tmp_path):
    for name in ("a.ckpt", "b.ckpt"):
        write(tmp_path / name, tensors())
    assert (tmp_path / "a.ckpt").read_bytes() == (tmp_path / "b.ckpt").read_bytes()


def test_one_tensor_is_in_memory_at_a_time(tmp_path):
    alive = []

    def read(name):
        gc.collect()
        assert all(reference() is None for reference in alive[:-1])
        tensor = torch.ones(1000)
        alive.append(weakref.ref(tensor))
        return tensor

    specs = {str(number): (torch.float32, (1000,)) for number in range(6)}
    write_torch_file(tmp_path / "model.ckpt", specs, read=read)
    assert len(alive) == 6


def test_nothing_is_left_of_a_file_that_fails(tmp_path):
    with pytest.raises(ShapeError, match="its spec says fp32"):
        write_torch_file(
            tmp_path / "a.ckpt", {"w": (torch.float32, (2,))}, read=lambda name: torch.ones(3)
        )
    with pytest.raises(CheckpointError, match="cannot hold"):
        write(tmp_path / "b.ckpt", {"w": torch.ones(2).to(torch.float8_e4m3fn)})
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="Cannot write"):
        write(tmp_path / "file" / "c.ckpt", tensors())
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
