"""Official checkpoint file to diffusers folder and back, one tensor in memory at a time.

The folder is what `from_pretrained` of `DynamiCrafterPipeline` or `VideoCrafterPipeline` reads:
`unet`, `vae`, `text_encoder`, `image_encoder`, `image_projector`, `scheduler`, and `tokenizer` if
its files were given. What no class has a place for (schedule buffers, the text tower's last layer
..) lies beside them in `unused.safetensors`, under its official names, so that the way back gives
the same file.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers.configuration_utils import ConfigMixin
from torch import nn
from transformers import PreTrainedModel

from motionmerge.errors import CheckpointError, ConfigError
from motionmerge.io.atomic import atomic_folder, check_new_folder
from motionmerge.io.quantised import refuse_quantised
from motionmerge.io.torch_file import write_torch_file
from motionmerge.io.weights import open_weights, write_weights

from .conversion import (
    COMPONENTS,
    ConvertedComponent,
    OfficialCheckpoint,
    unconvert_component,
)
from .encoders import load_tokenizer
from .lazy_tensors import LazyTensor, LazyTensors, lazy_tensors
from .official_config import default_size
from .scheduler import DynamicRescaleDDIMScheduler
from .unet import DynamiCrafterUNet

UNUSED_FILE = "unused.safetensors"
_INDEX_FILE = "model_index.json"
_PICKLES = {".ckpt", ".pt"}


@dataclass(frozen=True, kw_only=True)
class ConversionReport:
    """What an official checkpoint holds, or what was written.

    Attributes:
        pipeline: Class of the pipeline that makes videos with it.
        parameters: Number of parameters by component.
        tensors: Number of tensors by component, under our names.
        unused: Number of official tensors without a component.
        scheduler: Arguments of the scheduler that the checkpoint tells.
        has_adapter: Whether the U-Net has a text-to-temporal adapter.
        has_tokenizer: Whether the folder has a tokenizer.
    """

    pipeline: str
    parameters: dict[str, int]
    tensors: dict[str, int]
    unused: int
    scheduler: dict[str, Any]
    has_adapter: bool
    has_tokenizer: bool


def inspect_checkpoint(
    path: str | Path, *, overrides: Mapping[str, Mapping[str, Any]] | None = None
) -> ConversionReport:
    """Describe what `convert_checkpoint` would find; nothing is written.

    Raises:
        CheckpointError: the file cannot be read or is of another family.
    """
    with open_weights(path) as reader:
        refuse_quantised(reader, reader.metadata, called=str(path))
        return _report(OfficialCheckpoint(lazy_tensors(reader), overrides=overrides))


def convert_checkpoint(
    path: str | Path,
    output_folder: str | Path,
    *,
    dtype: torch.dtype | None = None,
    tokenizer: str | Path | None = None,
    add_adapter: bool = False,
    overwrite: bool = False,
    overrides: Mapping[str, Mapping[str, Any]] | None = None,
) -> ConversionReport:
    """Write an official checkpoint as a diffusers folder.

    Args:
        path: The official file.
        output_folder: A new or empty folder; it is filled when all of it is written.
        dtype: Of the written weights; by default each tensor keeps its own.
        tokenizer: Files of CLIP's tokenizer, see `encoders.load_tokenizer`. They are not part of an
            official checkpoint; without them the pipeline must be given a tokenizer.
        add_adapter: Also give the U-Net a text-to-temporal adapter that starts as the identity.
        overwrite: Replace a folder that an earlier conversion wrote.
        overrides: Configuration values by component, for what shapes do not tell.

    Raises:
        CheckpointError: the file cannot be read or is of another family.
        ConfigError: the folder is not empty, or there is an adapter already.
        DataError: the tokenizer's files are not there.
    """
    check_new_folder(output_folder, overwrite=overwrite, marker=_INDEX_FILE, keep=[Path(path)])
    index: dict[str, Any] = {
        "_diffusers_version": diffusers.__version__,
        **{component.name: [None, None] for component in COMPONENTS},
        "tokenizer": [None, None],
    }
    with open_weights(path) as reader, atomic_folder(output_folder) as folder:
        refuse_quantised(reader, reader.metadata, called=str(path))
        checkpoint = OfficialCheckpoint(lazy_tensors(reader), overrides=overrides)
        index["_class_name"] = checkpoint.pipeline
        if add_adapter:
            _add_adapter(checkpoint)
        if tokenizer is not None:
            loaded = load_tokenizer(tokenizer)
            loaded.save_pretrained(folder / "tokenizer")
            index["tokenizer"] = ["transformers", type(loaded).__name__]
        for name, converted in checkpoint.components.items():
            module = converted.component.empty_module(checkpoint.configs[name])
            _save_config(module, folder / name)
            _save_weights(folder / name, converted, dtype=dtype)
            index[name] = _library_and_class(module)
        schedule = checkpoint.scheduler_config()
        scheduler = DynamicRescaleDDIMScheduler(**schedule)
        scheduler.save_pretrained(folder / "scheduler")
        index["scheduler"] = _library_and_class(scheduler)
        index["height"], index["width"] = default_size(schedule, checkpoint.configs.get("unet", {}))
        if checkpoint.unused:
            _write(folder / UNUSED_FILE, checkpoint.unused)
        text = json.dumps(index, indent=2, sort_keys=True) + "\n"
        (folder / _INDEX_FILE).write_text(text, encoding="utf-8")
        return replace(_report(checkpoint), has_tokenizer=tokenizer is not None)


def to_official(folder: str | Path, path: str | Path) -> int:
    """Write a diffusers folder as an official checkpoint.

    A folder made by `convert_checkpoint` without `dtype` gives the same tensors, bit for bit; only
    the learned image scale of the 256 model stays folded into its `to_v_ip`, with scale 0 beside.

    Args:
        folder: Made by `convert_checkpoint` or `DynamiCrafterPipeline.save_pretrained`.
        path: The file to write: `.safetensors`, or `.ckpt` as the official code loads it. One
            tensor is in memory at a time.

    Returns:
        Number of tensors written.

    Raises:
        CheckpointError: a component cannot be read, holds unknown tensors, or none is there.
        ConfigError: the ending of `path` is neither.
    """
    folder, path = Path(folder), Path(path)
    if path.suffix not in {".safetensors", *_PICKLES}:
        raise ConfigError(
            f"Cannot write `{path.name}`.", fix="Let the name end with .safetensors or .ckpt."
        )
    with official_tensors(folder) as tensors:
        if path.suffix in _PICKLES:
            specs = {name: (tensor.dtype, tensor.shape) for name, tensor in tensors.items()}
            write_torch_file(path, specs, read=lambda name: tensors[name].read())
        else:
            _write(path, tensors)
        return len(tensors)


@contextmanager
def official_tensors(folder: str | Path) -> Iterator[LazyTensors]:
    """Open a diffusers folder and yield its tensors under their official names.

    Args:
        folder: Made by `convert_checkpoint` or `DynamiCrafterPipeline.save_pretrained`.

    Raises:
        CheckpointError: a component cannot be read, holds unknown tensors, or none is there.
    """
    folder = Path(folder)
    present = [component for component in COMPONENTS if (folder / component.name).is_dir()]
    if not present:
        raise CheckpointError(
            f"{folder} holds no component of DynamiCrafter.",
            fix="Name a folder that `motionmerge convert` or `save_pretrained` wrote.",
        )
    with ExitStack() as stack:
        tensors: LazyTensors = {}
        if (folder / UNUSED_FILE).is_file():
            tensors |= lazy_tensors(stack.enter_context(open_weights(folder / UNUSED_FILE)))
        for component in present:
            saved = lazy_tensors(stack.enter_context(open_weights(folder / component.name)))
            ours = {name.removeprefix(component.saved_prefix): t for name, t in saved.items()}
            for short, tensor in unconvert_component(component, ours).items():
                tensors[component.long_name(short)] = tensor
        yield tensors


def _add_adapter(checkpoint: OfficialCheckpoint) -> None:
    """Add the tensors of a fresh temporal adapter to the U-Net, the only ones in memory."""
    if "unet" not in checkpoint.components:
        raise CheckpointError(
            "This checkpoint has no U-Net to add an adapter to.",
            fix="Leave out `add_adapter=True`, or convert a whole checkpoint.",
        )
    converted = checkpoint.components["unet"]
    unet = converted.component.empty_module(checkpoint.configs["unet"])
    assert isinstance(unet, DynamiCrafterUNet)
    unet.conv_in.to_empty(device="cpu")  # a new adapter is made where this layer is
    unet.add_temporal_adapter()
    stored = converted.tensors["conv_in.weight"].dtype
    added = {
        name: LazyTensor.of(tensor.to(stored))
        for name, tensor in unet.state_dict().items()
        if name not in converted.tensors
    }
    checkpoint.components["unet"] = replace(converted, tensors={**converted.tensors, **added})
    checkpoint.configs["unet"] = {
        name: value for name, value in unet.config.items() if not name.startswith("_")
    }


def _report(checkpoint: OfficialCheckpoint) -> ConversionReport:
    parts = checkpoint.components
    return ConversionReport(
        pipeline=checkpoint.pipeline,
        parameters={name: part.num_parameters for name, part in parts.items()},
        tensors={name: len(part.tensors) for name, part in parts.items()},
        unused=len(checkpoint.unused),
        scheduler=checkpoint.scheduler_config(),
        has_adapter="temporal_adapter.queries"
        in (parts["unet"].tensors if "unet" in parts else ()),
        has_tokenizer=False,
    )


def _save_config(module: nn.Module, folder: Path) -> None:
    if isinstance(module, PreTrainedModel):
        module.config.save_pretrained(folder)
    else:
        assert isinstance(module, ConfigMixin)
        module.save_config(folder)


def _save_weights(
    folder: Path, converted: ConvertedComponent, *, dtype: torch.dtype | None
) -> None:
    component = converted.component
    tensors = {
        f"{component.saved_prefix}{name}": _cast(tensor, dtype)
        for name, tensor in converted.tensors.items()
    }
    _write(folder / component.file, tensors)


def _cast(tensor: LazyTensor, dtype: torch.dtype | None) -> LazyTensor:
    if dtype is None or not tensor.dtype.is_floating_point:
        return tensor
    return LazyTensor(dtype, tensor.shape, lambda: tensor.read().to(dtype))


def _write(path: Path, tensors: LazyTensors) -> None:
    specs = {name: (tensor.dtype, tensor.shape) for name, tensor in tensors.items()}

    def read_all() -> Iterator[tuple[str, torch.Tensor]]:
        for name, tensor in tensors.items():
            yield name, tensor.read()

    write_weights(path, read_all(), specs=specs, metadata={"format": "pt"})


def _library_and_class(part: object) -> list[str]:
    """Name a class as `model_index.json` does: the library, or our module."""
    library = type(part).__module__.split(".")[0]
    if library == "motionmerge":
        library = type(part).__module__
    return [library, type(part).__name__]
