"""Where an expression's tensors come from: files, pipeline folders, state dicts in memory.

`OpenInputs` opens every source of some expressions once and reads each tensor once, all under the
names of the first.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt

from motionmerge.errors import CheckpointError, RecipeError
from motionmerge.io.quantised import UNQUANTISED, ScaledWeight, refuse_scales_elsewhere
from motionmerge.io.weights import WeightsReader, copy_bytes, hash_weights, open_weights
from motionmerge.lazy_torch import torch
from motionmerge.merging.compute.compiled import Floats
from motionmerge.merging.inputs.dequantised import HoldsCodes, dequantised
from motionmerge.merging.inputs.renamed import in_one_name_space
from motionmerge.merging.names.wrappers import DENOISERS
from motionmerge.tensors import DType, num_bytes, storable, to_numpy

MODULES = (*DENOISERS, "image_projector")
"""Subfolders of a pipeline folder that take part in a merge; their names prefix the tensors'."""


Place = tuple[object, int]
"""A file and the byte in it where a tensor begins. Neighbours are read and written in one go."""


class TensorSource(Protocol):
    """What the engine needs of an open checkpoint; `io.weights.WeightsReader` is one.

    `keys` lists the names in order; `read` gives a tensor memory of its own, on the CPU.
    `read_into` reads its bytes from one on, as many as the target holds; `place` is None if nobody
    knows it.
    """

    def keys(self) -> list[str]: ...
    def shape(self, name: str, /) -> tuple[int, ...]: ...
    def dtype(self, name: str, /) -> DType: ...
    def read(self, name: str, /) -> torch.Tensor: ...
    def read_into(self, name: str, begin: int, target: memoryview, /) -> None: ...
    def place(self, name: str, /) -> Place | None: ...


class MemoryTensors:
    """A state dict as a source. Two of them are equal only if they are the same object.

    Attributes:
        is_checkpoint: Whether the tensors are weights as they are stored, and not made for a merge.
    """

    is_checkpoint = True

    def __init__(self, tensors: Mapping[str, torch.Tensor]) -> None:
        for name, tensor in tensors.items():
            if hasattr(type(tensor), "__tensor_flatten__"):  # several tensors behind one face
                raise CheckpointError(
                    f"`{name}` is a {type(tensor).__name__}, whose numbers are codes or parts.",
                    fix=UNQUANTISED,
                )
        self._tensors = {name: tensor.detach() for name, tensor in tensors.items()}

    def keys(self) -> list[str]:
        return list(self._tensors)

    def shape(self, name: str, /) -> tuple[int, ...]:
        return tuple(self._tensors[name].shape)

    def dtype(self, name: str, /) -> DType:
        return storable(self._tensors[name].dtype)

    def read(self, name: str, /) -> torch.Tensor:
        """Copy a tensor to the CPU, into memory of its own."""
        return self._tensors[name].to("cpu", copy=True)

    def read_into(self, name: str, begin: int, target: memoryview, /) -> None:
        if not self._tensors[name].is_contiguous():
            self._tensors[name] = self._tensors[name].contiguous()
        copy_bytes(self._tensors[name], begin, target)

    def place(self, name: str, /) -> None:
        """Return None: no tensor lies in a file."""

    def strangers(self) -> Mapping[str, str]:
        """List what goes nowhere in the model, with the reason; only LoRA files hold such."""
        return {}

    def unused_strengths(self) -> Sequence[str]:
        """List the keys of alpha whose layers are not there; only LoRA files hold such."""
        return ()

    def check_values(self) -> None:
        """Look for NaN and infinity where no tensor of this source is read as it is stored."""


class PipelineTensors:
    """Several modules as one source; tensor `key` of module `unet` is called `unet.key`."""

    def __init__(self, modules: Mapping[str, TensorSource]) -> None:
        self._owner = {
            f"{module}.{key}": (source, key)
            for module, source in modules.items()
            for key in source.keys()  # noqa: SIM118  (not a mapping)
        }
        coded = {m: source for m, source in modules.items() if isinstance(source, HoldsCodes)}
        self._coded = {f"{m}.{key}": (coded[m], key) for m in coded for key in modules[m].keys()}  # noqa: SIM118

    def keys(self) -> list[str]:
        """Return the prefixed names, module after module."""
        return list(self._owner)

    def shape(self, name: str, /) -> tuple[int, ...]:
        source, key = self._owner[name]
        return source.shape(key)

    def dtype(self, name: str, /) -> DType:
        source, key = self._owner[name]
        return source.dtype(key)

    def read(self, name: str, /) -> torch.Tensor:
        source, key = self._owner[name]
        return source.read(key)

    def read_into(self, name: str, begin: int, target: memoryview, /) -> None:
        source, key = self._owner[name]
        source.read_into(key, begin, target)

    def place(self, name: str, /) -> Place | None:
        source, key = self._owner[name]
        return source.place(key)

    def scaled(self, name: str, /) -> ScaledWeight | None:
        if name not in self._coded:
            return None
        source, key = self._coded[name]
        return source.scaled(key)

    def read_codes(self, name: str, begin: int, target: memoryview, /) -> None:
        source, key = self._coded[name]
        source.read_codes(key, begin, target)

    def scales(self, name: str, /) -> Floats:
        source, key = self._coded[name]
        return source.scales(key)


Origin = Path | MemoryTensors


@dataclass(frozen=True)
class Source:
    """A named checkpoint that an expression refers to.

    Attributes:
        name: Its name in formulas.
        origin: A weights file or folder, or tensors in memory; None while it is only a name in a
            recipe.
    """

    name: str
    origin: Origin | None = None

    def __hash__(self) -> int:
        return hash(self.name)


def module_folders(path: Path) -> list[Path]:
    """List the mergeable subfolders of a pipeline folder; empty if `path` is not one."""
    is_pipeline = (path / "model_index.json").is_file()
    if not path.is_dir() or (not is_pipeline and any(path.glob("*.safetensors"))):
        return []
    return [path / module for module in MODULES if (path / module).is_dir()]


def names_in(path: Path) -> list[str]:
    """List the tensors of weights; none of a pipeline's folder, which is no LoRA.

    Raises:
        CheckpointError: It cannot be read.
    """
    if module_folders(path):
        return []
    with open_weights(path) as reader:
        return reader.keys()


def hash_origin(path: Path) -> str:
    """Return `sha256:<hex>` of a weights file, of a sharded folder, or of a pipeline's modules."""
    folders = module_folders(path)
    if not folders:
        return hash_weights(path)
    lines = "".join(f"{folder.name} {hash_weights(folder)}\n" for folder in folders)
    return "sha256:" + hashlib.sha256(lines.encode()).hexdigest()


@contextmanager
def open_as_stored(path: Path) -> Iterator[dict[str, WeightsReader]]:
    """Open weights without asking what their numbers stand for; by prefix of the tensors' names."""
    with ExitStack() as stack:
        parts = {f"{folder.name}.": folder for folder in module_folders(path)} or {"": path}
        yield {prefix: stack.enter_context(open_weights(part)) for prefix, part in parts.items()}


class OpenInputs:
    """The open sources of some expressions; each tensor is read once, however many use it.

    Only the tensors of one name are kept at a time: ask name by name.

    Args:
        sources: What to open.
        allow_nonfinite: Accept NaN and infinity in the inputs.
        like: Names and shapes that all sources are presented under, as far as they are known by
            other names; by default those of the first source.
    """

    def __init__(
        self,
        sources: Iterable[Source],
        *,
        allow_nonfinite: bool = False,
        like: Mapping[str, tuple[int, ...]] | None = None,
    ) -> None:
        self._sources = tuple(dict.fromkeys(sources))
        self._like = like
        self._allow_nonfinite = allow_nonfinite
        self._stack = ExitStack()
        self._open: dict[Source, TensorSource] = {}
        self._names: dict[Source, frozenset[str]] = {}
        self._codes: dict[Source, HoldsCodes | None] = {}  # asked once: the question is slow
        self._current = ""
        self._stored: dict[Source, torch.Tensor] = {}
        self._values: dict[Source, torch.Tensor] = {}
        self.bytes_read = 0

    def __enter__(self) -> OpenInputs:
        with self._stack:
            for source in self._sources:
                self._open[source] = self._enter(source)
            # What was made for the first has its names already, as a fitted LoRA.
            named = {s: o for s, o in self._open.items() if self.is_checkpoint(s)}
            if self._sources:
                named = {self._sources[0]: self._open[self._sources[0]], **named}
            self._open |= in_one_name_space(named, like=self._like)
            for source in self._sources:
                self._names[source] = frozenset(self._open[source].keys())
                held = self._open[source]
                self._codes[source] = held if isinstance(held, HoldsCodes) else None
            self._stack = self._stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def _enter(self, source: Source) -> TensorSource:
        if source.origin is None:
            raise RecipeError(
                f"`{source.name}` is only a name: it has no weights.",
                fix=f"List it under `inputs:` or pass `inputs={{'{source.name}': path}}`.",
            )
        if isinstance(source.origin, MemoryTensors):
            if not self._allow_nonfinite:
                source.origin.check_values()
            if not source.origin.is_checkpoint:
                return source.origin
            return dequantised(source.origin, {}, called=source.name)
        if folders := module_folders(source.origin):
            return PipelineTensors({path.name: self._file(path, source.name) for path in folders})
        return self._file(source.origin, source.name)

    def _file(self, path: Path, called: str) -> TensorSource:
        """Open weights, whose codes are seen as the values that they stand for."""
        reader = self._stack.enter_context(open_weights(path))
        refuse_scales_elsewhere(path, reader, called=called)
        return dequantised(reader, reader.metadata, called=called)

    @property
    def sources(self) -> tuple[Source, ...]:
        """The open sources, each once."""
        return self._sources

    def names(self, source: Source) -> list[str]:
        """Return the names of a source's tensors, in its order."""
        return list(self._open[source].keys())

    def has(self, source: Source, name: str) -> bool:
        """Return whether a source holds a tensor."""
        return name in self._names[source]

    def is_checkpoint(self, source: Source) -> bool:
        """Check whether a source holds stored weights; a LoRA fitted to a model holds none."""
        return not isinstance(source.origin, MemoryTensors) or source.origin.is_checkpoint

    def strangers(self, source: Source) -> Mapping[str, str]:
        """List what of a source goes nowhere in the model, with the reason; see `LoraTensors`."""
        origin = source.origin
        return origin.strangers() if isinstance(origin, MemoryTensors) else {}

    def unused_strengths(self, source: Source) -> Sequence[str]:
        """List the keys of alpha of a source whose layers are not there."""
        origin = source.origin
        return origin.unused_strengths() if isinstance(origin, MemoryTensors) else ()

    def shape(self, source: Source, name: str) -> tuple[int, ...]:
        """Return a tensor's shape without reading it."""
        return tuple(self._open[source].shape(name))

    def dtype(self, source: Source, name: str) -> DType:
        """Return a tensor's dtype without reading it."""
        return self._open[source].dtype(name)

    def scaled(self, source: Source, name: str) -> ScaledWeight | None:
        """Describe how a tensor is stored as codes and scales; None if it is not."""
        held = self._codes[source]
        return None if held is None else held.scaled(name)

    def codes(self, source: Source) -> HoldsCodes | None:
        """Return a source that can read codes as they are stored; None if it holds none."""
        return self._codes[source]

    def forget(self) -> None:
        """Drop the tensors that are kept: the values of a source in memory have changed."""
        self._current = ""
        self._stored.clear()
        self._values.clear()

    def stored(self, source: Source, name: str) -> torch.Tensor:
        """Read a tensor as it is stored.

        Raises:
            CheckpointError: It holds NaN or infinity and that was not allowed.
        """
        if name != self._current:
            self._current = name
            self._stored.clear()
            self._values.clear()
        if source not in self._stored:
            tensor = self._open[source].read(name)
            self.count_read(source, name)
            if tensor.is_floating_point() and not self._allow_nonfinite:
                self.refuse_nonfinite(source, name, _computable(tensor).detach().cpu().numpy())
            self._stored[source] = tensor
        return self._stored[source]

    def doubles(self, source: Source, name: str) -> npt.NDArray[np.float64]:
        """Read the values of a floating-point tensor in fp64, without torch where NumPy can.

        Raises:
            CheckpointError: It holds NaN or infinity and that was not allowed.
        """
        dtype, shape = self.dtype(source, name), self.shape(source, name)
        has_bytes = self.is_checkpoint(source)  # a LoRA fitted to a model has values alone
        if not has_bytes or dtype not in (DType.FP64, DType.FP32, DType.FP16, DType.BF16):
            found: npt.NDArray[np.float64]
            found = self.stored(source, name).detach().cpu().double().numpy()
            return found
        raw = np.empty(num_bytes(dtype, shape), np.uint8)
        self.read_into(source, name, 0, raw.data)
        self.count_read(source, name)
        values = to_numpy(raw, dtype).reshape(shape)
        if not self._allow_nonfinite:
            self.refuse_nonfinite(source, name, values)
        return values.astype(np.float64)

    def count_read(self, source: Source, name: str) -> None:
        """Add a tensor to `bytes_read`."""
        weight = self.scaled(source, name)
        dtype = self.dtype(source, name) if weight is None else weight.codes
        self.bytes_read += num_bytes(dtype, self.shape(source, name))

    def value(self, source: Source, name: str) -> torch.Tensor:
        """Read a tensor for computing: fp32, or fp64 where it is stored as such. Do not modify."""
        stored = self.stored(source, name)
        if source not in self._values:
            self._values[source] = _computable(stored)
        return self._values[source]

    def read_into(self, source: Source, name: str, begin: int, target: memoryview) -> None:
        """Read the bytes of a tensor from `begin` on; `target` says how many. Any thread may.

        Reads on into what lies behind the tensor where it has a `place`. Nothing is checked: the
        caller does, with `refuse_nonfinite`.
        """
        self._open[source].read_into(name, begin, target)

    def place(self, source: Source, name: str) -> Place | None:
        """Return the file and the byte in it where a tensor begins; None where it is not known."""
        return self._open[source].place(name)

    @property
    def allow_nonfinite(self) -> bool:
        """NaN and infinity are accepted in the inputs."""
        return self._allow_nonfinite

    def refuse_nonfinite(self, source: Source, name: str, values: npt.NDArray[np.floating]) -> None:
        """Check the values of a floating-point tensor, or of a part of it.

        Raises:
            CheckpointError: It holds NaN or infinity.
        """
        finite = np.isfinite(values)
        if not finite.all():
            bad = int((~finite).sum())
            raise CheckpointError(
                f"`{name}` of `{source.name}` holds NaN or infinity in {bad} of "
                f"{values.size} entries that were read together.",
                fix="Use an undamaged checkpoint, or pass `allow_nonfinite=True`.",
            )


def _computable(tensor: torch.Tensor) -> torch.Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()
