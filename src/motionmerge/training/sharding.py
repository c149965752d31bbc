"""Networks whose parameters, gradients and moments are spread over all processes: torch's FSDP.

Networks are sharded one by one, and in them the blocks of their lists, so that a pipeline may call
a network by itself. States are written by `torch.distributed.checkpoint`, each process its part,
and may be read by another number of processes. Not accelerate's FSDP, which is DDP on a CPU.
"""

from __future__ import annotations

import pickle
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from accelerate import Accelerator
from torch import nn
from torch.distributed.checkpoint import filesystem, metadata
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from motionmerge.errors import CheckpointError, ConfigError, DataError

Tensors = Mapping[str, torch.Tensor]

_INDEX = "torch.distributed.checkpoint"
_MADE_OF: Mapping[tuple[str, str], Any] = {
    **{
        (f"{_INDEX}.metadata", one.__name__): one
        for one in (
            *(metadata.Metadata, metadata.MetadataIndex, metadata.StorageMeta),
            *(metadata.TensorStorageMetadata, metadata.TensorProperties),
            *(metadata.ChunkStorageMetadata, metadata._MEM_FORMAT_ENCODING),
        )
    },
    (f"{_INDEX}.filesystem", "_StorageInfo"): filesystem._StorageInfo,
    ("torch", "Size"): torch.Size,
    ("torch.serialization", "_get_layout"): torch.serialization._get_layout,
    ("pathlib", "PosixPath"): PurePosixPath,
    ("builtins", "getattr"): lambda kind, name: metadata._MEM_FORMAT_ENCODING[name],
}
"""What the index of a state is made of; not `BytesStorageMetadata`: torch unpickles what it names.
"""


class ShardedParameters:
    """The trained parameters of a module, which is sharded in place and stays so.

    Args:
        module: Its networks are its children.
        parameters: Those that are trained; they are emptied until `gather`.
        accelerator: Of the run.

    Raises:
        ConfigError: There is one process.
    """

    def __init__(
        self, module: nn.Module, parameters: Sequence[nn.Parameter], accelerator: Accelerator
    ) -> None:
        if accelerator.num_processes == 1:
            raise ConfigError(
                "`settings.shard` spreads a model over processes, and this is the only one.",
                fix="Start several with torchrun, or leave `shard` out.",
            )
        self._accelerator = accelerator
        trained = set(map(id, parameters))
        before = dict(module.named_parameters())
        mesh = init_device_mesh(accelerator.device.type, (accelerator.num_processes,))
        for network in list(module.children()) or [module]:
            for block in _blocks(network):
                fully_shard(block, mesh=mesh)
            fully_shard(network, mesh=mesh)
        after = dict(module.named_parameters())
        self.parameters = [after[name] for name, one in before.items() if id(one) in trained]
        self._whole = [one for one in before.values() if id(one) in trained]
        for one in before.values():
            one.data = one.new_empty(0)  # the callers' lists would keep the memory

    def gather(self) -> None:
        """Fill the parameters that came in with the whole values, on the first process."""
        for target, part in zip(self._whole, self.parameters, strict=True):
            value = whole(part.detach()).cpu()
            if self._accelerator.is_main_process:
                target.data = value

    def save(self, folder: Path, optimizer: torch.optim.Optimizer, average: Any | None) -> None:
        """Write parameters, moments and averages to a folder; all processes at once.

        Raises:
            DataError: The disk of one of them is full, or refuses otherwise.
        """
        if self._accelerator.is_main_process:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
        self._accelerator.wait_for_everyone()
        try:
            dcp.save(self._tensors(optimizer, average), checkpoint_id=folder)
        except (dcp.api.CheckpointException, OSError) as error:
            raise DataError(
                f"Cannot write {folder}: {_reasons(error)}",
                fix="Free space and start the same command again: it goes on.",
            ) from error

    def load(self, folder: Path, optimizer: torch.optim.Optimizer, average: Any | None) -> None:
        """Read what `save` wrote.

        Raises:
            CheckpointError: Something else is there.
        """
        for one in self.parameters:
            state = optimizer.state[one]
            state["step"] = torch.zeros(())
            for name in ("exp_avg", "exp_avg_sq"):
                state[name] = torch.zeros_like(one)
        tensors = dict(self._tensors(optimizer, average))
        try:
            dcp.load(tensors, storage_reader=_Reader(folder))
        except dcp.api.CheckpointException as error:
            raise CheckpointError(
                f"{folder} cannot be read: {_reasons(error)}",
                fix="Remove it: the run goes on from the state before it.",
            ) from error

    def _tensors(self, optimizer: torch.optim.Optimizer, average: Any | None) -> Tensors:
        found: dict[str, torch.Tensor] = {}
        for number, one in enumerate(self.parameters):
            found[f"trained.{number}"] = one.detach()
            for name, value in optimizer.state[one].items():
                found[f"optimizer.{number}.{name}"] = value
        for number, one in enumerate(() if average is None else average.shadow_params):
            found[f"average.{number}"] = one
        return found


def _reasons(error: BaseException) -> str:
    """Return what went wrong on the processes, without their tracebacks."""
    failures = getattr(error, "failures", {0: (error, None)})
    return "; ".join(sorted({str(one[0])[:200] for one in failures.values()}))


class _Reader(filesystem.FileSystemReader):
    """Reads states; torch would unpickle their index, and so run what a stranger wrote into it."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> metadata.Metadata:
        with (Path(self.path) / ".metadata").open("rb") as file:
            index = _IndexUnpickler(file).load()
        if not isinstance(index, metadata.Metadata):
            raise pickle.UnpicklingError("its index is none")
        index.storage_meta = metadata.StorageMeta(load_id=self.load_id)
        return index


class _IndexUnpickler(pickle.Unpickler):
    """Makes the records of an index, and calls nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        known = _MADE_OF.get((module, name))
        if known is None and module == "torch" and isinstance(getattr(torch, name), torch.dtype):
            known = getattr(torch, name)
        if known is None:
            raise pickle.UnpicklingError(f"its index asks for {module[:80]}.{name[:80]}")
        return known


def whole(value: torch.Tensor) -> torch.Tensor:
    """Return a value of which each process may have a part; all processes at once."""
    return value.full_tensor() if isinstance(value, DTensor) else value


def _blocks(network: nn.Module) -> Iterator[nn.Module]:
    """Yield the members of the outermost lists of a network."""
    for child in network.children():
        if isinstance(child, nn.ModuleList):
            yield from child
        else:
            yield from _blocks(child)
