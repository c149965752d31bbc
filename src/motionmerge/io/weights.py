"""Lazy reading of weights in every form people have them, and safe writing of one form.

Read: a safetensors file, a folder of them (diffusers and transformers names, sharded or not), and
legacy `.ckpt`/`.pt`/`.pth`/`.bin` pickles, which can hold nothing but tensors and plain values.
"""

from __future__ import annotations

import hashlib
import math
import os
import pickle
import re
import struct
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from motionmerge.errors import CheckpointError
from motionmerge.io.atomic import atomic_path, disk_errors
from motionmerge.io.first_bytes import PICKLE_SUFFIXES, weights_format
from motionmerge.io.hashing import hash_file
from motionmerge.io.json_file import read_json
from motionmerge.io.quantised import MARKER
from motionmerge.io.safetensors_file import (
    SafetensorsFile,
    SafetensorsWriter,
    TensorSpec,
    check_spec,
)
from motionmerge.lazy_torch import torch
from motionmerge.tensors import DType, bytes_of, storable

_PICKLE_FAULTS = (  # what torch.load raises on damaged files, besides UnpicklingError
    ArithmeticError,
    AssertionError,
    AttributeError,
    EOFError,
    LookupError,
    OSError,
    RuntimeError,
    TypeError,
    ValueError,
    struct.error,
)
_WRAPPERS = ("state_dict", "module")
_ENTRIES = (
    "model", "model_state_dict", "generator", "generator_ema", "ema", "ema_state_dict", "net",
    "network", "transformer", "dit", "params", "params_ema", "weights",
)  # fmt: skip
"""What training scripts call the weights beside optimizer and step; read where there is one."""
_META = "meta tensor, which has a shape and no values (no data)"
_LAYERS_OWN = ("weight", "bias")
_SHARD = re.compile(r"-\d+-of-(\d{1,9})\.safetensors$")
_PREFERRED = ("diffusion_pytorch_model", "model")


class PickleFile:
    """Tensors of a legacy checkpoint, memory-mapped where its format allows.

    Raises:
        CheckpointError: The file is damaged, holds code, or holds something else than tensors.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.metadata: dict[str, str] = {}
        state = _load_pickle(path)
        for wrapper in (*_WRAPPERS, _entry(path, state), *_WRAPPERS):
            if isinstance(state, dict) and isinstance(state.get(wrapper), dict):
                state = state[wrapper]
        if not isinstance(state, dict):
            raise CheckpointError(
                f"{path} holds a {type(state).__name__}, not a mapping of names to tensors.",
                fix="Save `model.state_dict()` instead of the model.",
            )
        _refuse_special_tensors(path, state)
        self.tensors: dict[str, torch.Tensor] = state

    def read(self, name: str) -> torch.Tensor:
        """Copy one tensor into memory of its own."""
        return self.tensors[name].detach().clone(memory_format=torch.contiguous_format)

    def read_into(self, name: str, begin: int, target: memoryview) -> None:
        """Copy the bytes of a tensor from `begin` on; `target` says how many."""
        if not self.tensors[name].is_contiguous():
            self.tensors[name] = self.tensors[name].contiguous()
        copy_bytes(self.tensors[name], begin, target)

    def place(self, name: str) -> None:
        """Return None: a tensor has no known place in the file."""

    def close(self) -> None:
        """Release the tensors, and with them the mapped file."""
        self.tensors = {}


def _entry(path: Path, state: Any) -> str | None:
    """Return the entry of a checkpoint of a training that holds the weights; None if none does.

    Raises:
        CheckpointError: Several do, such as the weights and their moving average.
    """
    held = state if isinstance(state, dict) else {}
    found = [name for name in _ENTRIES if isinstance(held.get(name), dict)]
    if len(found) > 1:
        raise CheckpointError(
            f"{path} holds the weights of several models: {', '.join(f'`{n}`' for n in found)}.",
            fix="Save the one that you mean alone: "
            f"`torch.save(torch.load(file, weights_only=True)['{found[-1]}'], 'one.pt')`.",
        )
    return found[0] if found else None


def _refuse_special_tensors(path: Path, state: Mapping[Any, Any]) -> None:
    """Refuse what is no tensor of plain numbers in main memory.

    Raises:
        CheckpointError: Says what there is instead, how often and where.
    """
    found: dict[str, list[str]] = {}
    for name, value in state.items():
        kind = _special_kind(value) if isinstance(name, str) else f"value under {name!r:.60}"
        if kind is not None:
            found.setdefault(kind, []).append(str(name))
    for kind, names in found.items():
        fix = "Save only the state dict of the model, with plain tensors."
        if kind == _META:
            fix = (
                "Save it again with all weights in memory: gather a sharded model first, or load "
                "it without offloading."
            )
        raise CheckpointError(
            f"{path} holds {len(names)} of its {len(state)} entries as a {kind}, e.g. "
            f"`{names[0][:100]}`, not as plain tensors.",
            fix=fix,
        )


def _special_kind(value: object) -> str | None:
    """Name what a value is, unless it is a tensor of plain numbers."""
    if not isinstance(value, torch.Tensor):
        return type(value).__name__
    if value.is_meta:
        return _META
    if value.is_nested:
        return "nested tensor"
    if value.is_quantized:
        return "quantised tensor"
    if value.layout != torch.strided:
        return f"sparse tensor ({str(value.layout).removeprefix('torch.')})"
    if type(value) not in (torch.Tensor, torch.nn.Parameter):
        return f"{type(value).__name__} in place of a tensor"
    return None


def copy_bytes(tensor: torch.Tensor, begin: int, target: memoryview) -> None:
    """Copy the bytes of a contiguous tensor, on any device, from `begin` on into `target`."""
    flat = tensor.detach().view(-1).view(torch.uint8)
    torch.frombuffer(target, dtype=torch.uint8).copy_(flat[begin : begin + len(target)])


def _load_pickle(path: Path) -> Any:
    try:
        with path.open("rb") as file:
            mappable = file.read(2) == b"PK"
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mappable)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path} was refused: it is damaged, or it is a pickle that holds more than tensors "
            "and could run code.",
            fix="Use a safetensors version, or convert it on a machine where you trust the file.",
        ) from error
    except _PICKLE_FAULTS as error:
        if "TorchScript" in str(error):  # torch's own advice would be to run the program
            raise CheckpointError(
                f"{path} is a TorchScript program, not a file of weights.",
                fix="Give the weights: `torch.save(model.state_dict(), ..)`, or safetensors.",
            ) from error
        raise CheckpointError(
            f"{path} cannot be read as a torch checkpoint: {error}",
            fix="Download the file again, or use a safetensors version.",
        ) from error


class WeightsReader:
    """The tensors of one model, read one by one from one or several files.

    Use it as a context manager, or call `close()`.

    Attributes:
        path: What was opened: a file or a folder.
        files: The weight files behind it.
        metadata: The text metadata of the files' headers.
    """

    def __init__(self, path: Path, parts: Sequence[SafetensorsFile | PickleFile]) -> None:
        self.path = path
        self.files = tuple(part.path for part in parts)
        self.metadata: dict[str, str] = {}
        self._parts = parts
        self._home: dict[str, SafetensorsFile | PickleFile] = {}
        for part in parts:
            self.metadata.update(part.metadata)
            for name in part.tensors:
                if name in self._home:
                    raise CheckpointError(
                        f"`{name}` is in both {self._home[name].path.name} and {part.path.name} "
                        f"of {path}.",
                        fix="Keep the shards of one checkpoint in a folder, or name one file.",
                    )
                self._home[name] = part
        self._refuse_empty()

    def keys(self) -> list[str]:
        """Return the names of the tensors in file order."""
        return list(self._home)

    def __contains__(self, name: object) -> bool:
        return name in self._home

    def __len__(self) -> int:
        return len(self._home)

    def _refuse_empty(self) -> None:
        """Refuse weights of no entries, which DeepSpeed leaves where it has sharded a model."""
        empty = [
            name
            for name in self._home
            if self.dtype(name).is_floating_point
            and 0 in self.shape(name)
            and name.rpartition(".")[2] != MARKER  # of ComfyUI, empty or of two entries
            and (self.shape(name) == (0,) or name.rpartition(".")[2] in _LAYERS_OWN)
        ]
        if empty:
            raise CheckpointError(
                f"{len(empty)} of the {len(self._home)} tensors of {self.path} are empty, e.g. "
                f"`{empty[0]}` of shape {list(self.shape(empty[0]))}: they have no values.",
                fix="Save the model again with its weights gathered (DeepSpeed's ZeRO-3: "
                "`zero_to_fp32.py`, or `stage3_gather_16bit_weights_on_model_save`).",
            )

    def _part(self, name: str) -> SafetensorsFile | PickleFile:
        if name not in self._home:
            raise CheckpointError(
                f"{self.path} has no tensor `{name}`.", fix="List its names with `keys()`."
            )
        return self._home[name]

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor, without reading it."""
        return tuple(self._part(name).tensors[name].shape)

    def dtype(self, name: str) -> DType:
        """Return the dtype of a tensor, without reading it."""
        return storable(self._part(name).tensors[name].dtype)

    def read(self, name: str) -> torch.Tensor:
        """Read a tensor into memory of its own, in its stored dtype, on the CPU."""
        return self._part(name).read(name)

    def read_into(self, name: str, begin: int, target: memoryview) -> None:
        """Read the bytes of a tensor from `begin` on; `target` says how many. Any thread may."""
        self._part(name).read_into(name, begin, target)

    def place(self, name: str) -> tuple[object, int] | None:
        """Return the file and the byte in it where a tensor begins; None where that is not known.

        What is next to it there can be read together with it.
        """
        return self._part(name).place(name)

    @property
    def num_parameters(self) -> int:
        """Number of elements of all tensors."""
        return sum(math.prod(self.shape(name)) for name in self._home)

    def close(self) -> None:
        """Close all files."""
        for part in self._parts:
            part.close()

    def __enter__(self) -> WeightsReader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def open_weights(path: str | Path) -> WeightsReader:
    """Open a file or a folder of weights; only headers are read.

    Args:
        path: A `.safetensors` file, a folder that holds one model's, or a legacy pickle.

    Raises:
        CheckpointError: It is missing, damaged, refused, or it is not clear which files are meant.
    """
    path = Path(path)
    parts: list[SafetensorsFile | PickleFile] = []
    try:
        for file in _find_files(path):
            is_pickle = weights_format(file) == "torch"
            parts.append(PickleFile(file) if is_pickle else SafetensorsFile(file))
        reader = WeightsReader(path, parts)
        if path.is_dir():
            _check_index(reader)
    except BaseException:
        for part in parts:
            part.close()
        raise
    return reader


def hash_weights(path: str | Path) -> str:
    """Hash the bytes of a weights file, or of all weight files of a folder with their names.

    Returns:
        `sha256:` and 64 hexadecimal digits.

    Raises:
        CheckpointError: There are no such weights.
    """
    path = Path(path)
    files = _find_files(path)
    for file in files:
        weights_format(file)  # a pointer or a web page is named, not hashed
    with ThreadPoolExecutor(max_workers=min(len(files), os.cpu_count() or 1)) as pool:
        digests = dict(zip((file.name for file in files), pool.map(hash_file, files), strict=True))
    if not path.is_dir():
        return f"sha256:{next(iter(digests.values()))}"
    listing = "".join(f"{name}\0{digest}\n" for name, digest in sorted(digests.items()))
    return f"sha256:{hashlib.sha256(listing.encode()).hexdigest()}"


def _find_files(path: Path) -> list[Path]:
    if path.is_dir():
        index = _find_index(path)
        if index is not None:
            return sorted({path / name for name in _read_index(index).values()})
        return _files_without_index(path)
    if not path.is_file():
        if path.is_symlink():
            return [path]  # whoever reads its first bytes says that it leads nowhere
        near = ""
        if path.parent.is_dir():
            others = [p.name for p in sorted(path.parent.iterdir()) if p.suffix == path.suffix]
            near = f" Its folder holds {', '.join(others[:5])}." if others else ""
        raise CheckpointError(f"There are no weights at {path}.", fix=f"Check the path.{near}")
    return [path]


def _find_index(folder: Path) -> Path | None:
    """Find the index of a folder: that of plain shards, or of a variant where it is alone."""
    found = {p.name: p for p in sorted(folder.glob("*.safetensors.index.json"))}
    for stem in _PREFERRED:
        if f"{stem}.safetensors.index.json" in found:
            return found[f"{stem}.safetensors.index.json"]
    if not found and not any((folder / f"{stem}.safetensors").is_file() for stem in _PREFERRED):
        # diffusers names the index of shards in fp16 `<stem>.safetensors.index.fp16.json`
        found = {p.name: p for p in sorted(folder.glob("*.safetensors.index.*.json"))}
    if len(found) > 1:
        raise CheckpointError(
            f"{folder} holds {len(found)} shard indices: {', '.join(found)}.",
            fix="Keep one model, in one variant, in a folder.",
        )
    return next(iter(found.values()), None)


def _read_index(index: Path) -> dict[str, str]:
    """Read the map of tensor names to shards; a shard is a plain file name beside the index."""
    fix = "Download the folder again."
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"The `weight_map` of {index} is empty or no mapping.", fix=fix)
    for name, shard in weight_map.items():
        if not isinstance(shard, str) or not shard.endswith(".safetensors"):
            raise CheckpointError(f"{index} puts `{name}` into {shard!r}.", fix=fix)
        if Path(shard).name != shard or "\\" in shard or "\0" in shard:
            raise CheckpointError(
                f"{index} points outside its folder: `{shard}`.",
                fix="Do not use this checkpoint; get it from a source that you trust.",
            )
        if not (index.parent / shard).is_file():
            raise CheckpointError(f"Shard `{shard}` of {index} is missing.", fix=fix)
    return weight_map


def _check_index(reader: WeightsReader) -> None:
    index = _find_index(reader.path)
    missing = [] if index is None else [key for key in _read_index(index) if key not in reader]
    if missing:
        raise CheckpointError(
            f"{index} lists {len(missing)} tensors that its shards lack, e.g. `{missing[0]}`.",
            fix="Download the folder again.",
        )


def _files_without_index(folder: Path) -> list[Path]:
    found = sorted(folder.glob("*.safetensors"))
    usual = next((p for stem in _PREFERRED if (p := folder / f"{stem}.safetensors") in found), None)
    of = [int(match[1]) for p in found if (match := _SHARD.search(p.name))]
    if usual is None and max(of, default=1) > 1:
        raise CheckpointError(
            f"{folder} holds {len(of)} shards of a model of {max(of)} and no index, so nothing "
            f"says whether it is whole: {', '.join(p.name for p in found[:5])}.",
            fix="Download the folder again, with its `.safetensors.index.json`.",
        )
    if usual is not None or len(found) == 1:
        return [usual or found[0]]
    if found:
        names = ", ".join(p.name for p in found[:5])
        raise CheckpointError(
            f"{folder} holds {len(found)} safetensors files and no index: {names}.",
            fix="Name the file you mean.",
        )
    inside = sorted({p.parent.name for p in folder.glob("*/*.safetensors")})
    legacy = sorted(p.name for p in folder.iterdir() if p.suffix.lower() in PICKLE_SUFFIXES)
    fix = "Check the path."
    if inside:
        fix = f"Point at one of its parts: {', '.join(inside)}."
    elif legacy:
        fix = f"Name the file you mean: {', '.join(legacy)}."
    raise CheckpointError(f"{folder} holds no safetensors file.", fix=fix)


def write_weights(
    path: str | Path,
    tensors: Iterable[tuple[str, torch.Tensor]],
    *,
    specs: Mapping[str, TensorSpec],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Stream tensors into a safetensors file that appears only when it is whole.

    Args:
        path: The file to write; missing folders are created.
        tensors: Pairs of name and tensor, each once, in any order; one is in memory at a time.
        specs: Dtype and shape of every tensor that will come.
        metadata: Text to keep in the header.

    Raises:
        ShapeError: A tensor differs from its spec.
        CheckpointError: A tensor is missing, unexpected or repeated, or the disk refuses.
    """
    missing = dict.fromkeys(specs)
    with disk_errors(CheckpointError, path), atomic_path(path) as temporary:
        with SafetensorsWriter(temporary, specs, metadata) as file:
            for name, tensor in tensors:
                if name not in missing:
                    raise CheckpointError(
                        f"Tensor `{name}` for {path} is not in its specs, or came twice.",
                        fix="Give every tensor of the specs exactly once.",
                    )
                check_spec(name, tensor, specs[name])
                file.write_at(name, 0, bytes_of(tensor.cpu()).data)
                del missing[name]
        if missing:
            raise CheckpointError(
                f"{len(missing)} tensors of the specs never came for {path}, "
                f"e.g. `{next(iter(missing))}`.",
                fix="Give every tensor of the specs exactly once.",
            )


def save_weights(
    path: str | Path,
    tensors: Mapping[str, torch.Tensor],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write tensors that are in memory; see `write_weights`."""
    specs = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    write_weights(path, tensors.items(), specs=specs, metadata=metadata)
