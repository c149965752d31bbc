"""Load an image-to-video pipeline and put it on a device, if memory will do."""

from __future__ import annotations

import importlib
import inspect
import os
import pickle
import struct
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import diffusers
import safetensors
import torch
from diffusers.schedulers.scheduling_utils import SCHEDULER_CONFIG_NAME
from packaging.version import Version

from motionmerge.errors import CheckpointError, ConfigError
from motionmerge.io.weights import open_weights
from motionmerge.memory import SHARE, free_memory, gigabytes
from motionmerge.merging.inputs.sources import MODULES
from motionmerge.models.video_pipeline import Config, Scheduler, VideoPipeline
from motionmerge.sampling.request.bounded_networks import bounded_layers, empty_network
from motionmerge.sampling.request.folder import (
    PipelineFolder,
    first_line,
    num_stored,
    pipeline_class,
    variant_of,
)
from motionmerge.sampling.request.modular_folder import empty_pipeline
from motionmerge.text import fix_unknown_name

_DTYPE = "dtype" if Version(diffusers.__version__) >= Version("0.42") else "torch_dtype"

_FAULTS = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    EOFError,
    ImportError,
    LookupError,
    MemoryError,
    OSError,
    RuntimeError,
    TypeError,
    ValueError,
    pickle.UnpicklingError,
    safetensors.SafetensorError,
    struct.error,
)
"""What diffusers, transformers and torch raise on folders that are damaged or made to be."""


class DrawsProgress(Protocol):
    """A pipeline, or a block of a modular one."""

    progress_bar: Callable[..., object]

    def set_progress_bar_config(self, **options: bool | str) -> None: ...


DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class DenoiserToCome:
    """Stands in a pipeline for a denoiser that is not loaded yet.

    Attributes:
        config: Its configuration.
    """

    config: Config


def load_pipeline(
    folder: PipelineFolder,
    *,
    dtype: torch.dtype = torch.float32,
    variant: str | None = None,
    legacy: bool = False,
    encode: Callable[[VideoPipeline], None] | None = None,
) -> VideoPipeline:
    """Load a pipeline into main memory.

    Args:
        folder: Where it is.
        dtype: Of its weights.
        variant, legacy: See `find_pipeline`.
        encode: Only for pipelines of ours: called with the pipeline before its U-Net is loaded, so
            that encoders which are freed there never are in memory together with it.

    Raises:
        ConfigError: There is not enough free memory.
        CheckpointError: A part cannot be loaded.
    """
    check_memory(folder, dtype, torch.device("cpu"))
    options = {
        _DTYPE: dtype,
        "use_safetensors": None if legacy else True,
        "local_files_only": True,
    }
    if folder.family.modular is not None:
        with _named_faults(folder):
            return _load_modular(folder, variant, options)
    made_by = pipeline_class(folder.family)
    names = [part for part in folder.weights if part in inspect.signature(made_by).parameters]
    later = () if encode is None else ("unet",)
    with _named_faults(folder):
        parts = {
            part: None if part in later else _load_part(folder, part, variant, options)
            for part in names
        }
        pipeline: VideoPipeline = made_by.from_pretrained(
            folder.path, **parts, **options, trust_remote_code=False
        )
        if encode is not None:
            with torch.device("meta"):
                made_of = dict(folder.configs["unet"])
                config = _class_of(folder, "unet").from_config(made_of).config
            pipeline.register_modules(unet=DenoiserToCome(config))
    if encode is not None:
        encode(pipeline)
        with _named_faults(folder):
            unet = _load_part(folder, "unet", variant, options)
        pipeline.register_modules(unet=unet)
    return pipeline


def _load_modular(
    folder: PipelineFolder, variant: str | None, options: Mapping[str, object]
) -> VideoPipeline:
    """Assemble a modular pipeline from the parts and settings of its folder."""
    index, pipeline = folder.configs[""], empty_pipeline(folder.family)
    parts = {
        part: _load_part(folder, part, variant, options)
        if part in folder.weights
        else _class_of(folder, part).from_pretrained(folder.path / part, local_files_only=True)
        for part in pipeline.pretrained_component_names
        if part in index
    }
    settings = [spec.name for spec in pipeline.blocks.expected_configs]
    pipeline.update_components(**parts, **{n: index[n] for n in settings if n in index})
    loaded: VideoPipeline = pipeline
    return loaded


def _load_part(
    folder: PipelineFolder, part: str, variant: str | None, options: Mapping[str, object]
) -> torch.nn.Module:
    """Load a network of a pipeline, ready to infer.

    Raises:
        CheckpointError: It cannot be loaded, or its files lack some of its tensors, which diffusers
            and transformers would make up at random.
    """
    files = folder.weights[part]
    made_by = _class_of(folder, part)
    if files[0].suffix != ".safetensors":
        for file in files:
            open_weights(file).close()  # names a pickle that holds code, or is damaged
    more: dict[str, object] = {}
    if issubclass(made_by, diffusers.ModelMixin):
        _empty_part(folder, part)
    else:
        more["trust_remote_code"] = False
    with bounded_layers(f"`{part}` of {folder.name}"):
        network, found = made_by.from_pretrained(
            folder.path / part,
            variant=variant_of(files[0]),
            output_loading_info=True,
            **options,
            **more,
        )
    missing = sorted(found["missing_keys"])
    if missing:
        raise CheckpointError(
            f"`{part}` of {folder.name} lacks {len(missing)} of its tensors, such as "
            f"`{missing[0]}`.",
            fix="Download the folder again; if it is whole, its names are those of another version "
            "of diffusers or transformers.",
        )
    loaded: torch.nn.Module = network.eval()
    return loaded


def empty_modules(folder: PipelineFolder) -> dict[str, torch.nn.Module]:
    """Build the modules that experts can switch, without memory for their weights.

    Raises:
        CheckpointError: A configuration is none of its class.
    """
    with _named_faults(folder):
        own = [part for part in MODULES if part in folder.weights]  # the denoiser comes first
        return {part: _empty_part(folder, part) for part in own}


def _empty_part(folder: PipelineFolder, part: str) -> torch.nn.Module:
    return empty_network(
        _class_of(folder, part),
        dict(folder.configs[part]),
        name=f"`{part}` of {folder.name}",
        num_stored=num_stored(folder.weights[part]),
    )


def load_scheduler(folder: PipelineFolder) -> Scheduler | None:
    """Build the scheduler of a pipeline from its configuration; None if it has none.

    Raises:
        CheckpointError: The configuration is none of its class.
    """
    if not (folder.path / "scheduler" / SCHEDULER_CONFIG_NAME).is_file():
        return None
    with _named_faults(folder):
        made_by = _class_of(folder, "scheduler")
        scheduler: Scheduler = made_by.from_pretrained(folder.path, subfolder="scheduler")
        return scheduler


def _class_of(folder: PipelineFolder, part: str) -> Any:
    library, name = folder.configs[""][part]
    module = getattr(diffusers.pipelines, library, None) or importlib.import_module(library)
    return getattr(module, name)


@contextmanager
def _named_faults(folder: PipelineFolder) -> Iterator[None]:
    try:
        yield
    except _FAULTS as error:
        raise CheckpointError(
            f"{folder.name} cannot be loaded: {first_line(error)}",
            fix="Check that the folder is whole, and that diffusers and transformers know it.",
        ) from error


def place(
    pipeline: VideoPipeline, folder: PipelineFolder, device: torch.device, dtype: torch.dtype
) -> str:
    """Move a pipeline to a device: the whole of it, or part by part while it runs.

    Returns:
        What was done, in words.

    Raises:
        ConfigError: Even the largest part does not fit.
    """
    free = free_memory(device)
    sizes = folder.num_bytes(dtype)
    total, largest = sum(sizes.values()), max(sizes.values(), default=0)
    note = "; its sound is not written" if folder.family.makes_sound else ""
    if device.type == "cpu":
        return f"{gigabytes(total)} of weights in main memory{note}"
    if free is None or total <= SHARE * free:
        pipeline.to(device)
        return f"{gigabytes(total)} of weights on {device}{note}"
    if largest > SHARE * free:
        raise _too_large(folder.name, largest, free, device, what="the largest part")
    _take_turns(pipeline, device)
    return (
        f"{gigabytes(total)} of weights, {gigabytes(free)} free on {device}: "
        f"its parts take turns there{note}"
    )


def _take_turns(pipeline: VideoPipeline, device: torch.device) -> None:
    """Move the parts of a pipeline to a device only while they compute."""
    if hasattr(pipeline, "enable_model_cpu_offload"):
        pipeline.enable_model_cpu_offload(device=device)
        return
    from diffusers import ComponentsManager

    manager = ComponentsManager()
    for name, part in pipeline.components.items():
        if isinstance(part, torch.nn.Module):
            manager.add(name, part)
    manager.enable_auto_cpu_offload(device=device)


def hide_loading_bars() -> None:
    """Stop diffusers and transformers drawing progress bars into our lines while they load."""
    from transformers.utils import logging as transformers_logging

    diffusers.utils.logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()


def show_progress(pipeline: VideoPipeline, *, is_quiet: bool) -> None:
    """Set whether a pipeline draws its progress bars."""
    for part in parts_with_bars(pipeline):
        part.set_progress_bar_config(disable=is_quiet)


def parts_with_bars(pipeline: VideoPipeline) -> list[DrawsProgress]:
    """Return all that draws progress bars: a pipeline, and of a modular one its blocks as well.

    A modular pipeline passes its settings on to its outermost blocks alone.
    """
    blocks = list(getattr(getattr(pipeline, "_blocks", None), "sub_blocks", {}).values())
    for block in blocks:  # grows while it is walked
        blocks.extend(block.sub_blocks.values())
    drawing = [block for block in blocks if hasattr(block, "set_progress_bar_config")]
    return [pipeline, *drawing]


def check_memory(folder: PipelineFolder, dtype: torch.dtype, device: torch.device) -> None:
    """Refuse a pipeline whose weights do not fit into a device's free memory.

    Raises:
        ConfigError: Gives both numbers.
    """
    free, total = free_memory(device), sum(folder.num_bytes(dtype).values())
    if free is not None and total > SHARE * free:
        raise _too_large(folder.name, total, free, device, what=f"its weights in {dtype}")


def default_device() -> torch.device:
    """Take the GPU of this process if there is one: that of `LOCAL_RANK`, else the first."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    local = int(os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", "0")))
    return torch.device("cuda", local % torch.cuda.device_count())


def check_device(device: torch.device) -> None:
    """Refuse a device that this machine has not.

    Raises:
        ConfigError: Says which there are.
    """
    gpus = [f"cuda:{index}" for index in range(torch.cuda.device_count())]
    there = ["cpu", *gpus, *(["mps:0"] if torch.backends.mps.is_available() else [])]
    wanted = "cpu" if device.type == "cpu" else f"{device.type}:{device.index or 0}"
    if wanted not in there:
        raise ConfigError(
            f"There is no device {device} here, but {', '.join(there)}.",
            fix="Use one of these, or leave `device` out.",
        )


def dtype_named(name: str) -> torch.dtype:
    """Read fp32, fp16 or bf16.

    Raises:
        ConfigError: It is another name.
    """
    if name not in DTYPES:
        raise ConfigError(f"There is no dtype `{name}`.", fix=fix_unknown_name(name, DTYPES))
    return DTYPES[name]


def _too_large(
    name: str, needed: int, free: int, device: torch.device, *, what: str
) -> ConfigError:
    where = "main memory" if device.type == "cpu" else f"memory on {device}"
    return ConfigError(
        f"{name} does not fit: {gigabytes(needed)} for {what}, and {gigabytes(free)} of {where} "
        "are free.",
        fix="Load it in bf16 if it is not yet, `dtype`, close other programs, or use a smaller "
        "model or machine with more memory.",
    )
