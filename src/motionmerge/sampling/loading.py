"""Load an image-to-video pipeline and put it on a device, if memory will do."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from motionmerge.errors import CheckpointError, ConfigError
from motionmerge.models.dynamicrafter.unet import DynamiCrafterUNet
from motionmerge.sampling.memory import SHARE, free_memory, gigabytes
from motionmerge.sampling.pipeline_folder import PipelineFolder, first_line, pipeline_class
from motionmerge.text import fix_unknown_name

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class DenoiserToCome:
    """Stands in a pipeline for a denoiser that is not loaded yet.

    Attributes:
        config: Its configuration.
    """

    config: Any


def load_pipeline(
    folder: PipelineFolder,
    *,
    dtype: torch.dtype = torch.float32,
    variant: str | None = None,
    legacy: bool = False,
    encode: Callable[[Any], None] | None = None,
) -> Any:
    """Load a pipeline into main memory.

    Args:
        folder: Where it is.
        dtype: Of its weights.
        variant, legacy: See `find_pipeline`.
        encode: Only for DynamiCrafter: called with the pipeline before its U-Net is loaded, so
            that encoders which are freed there never are in memory together with it.

    Raises:
        ConfigError: There is not enough free memory.
        CheckpointError: A part cannot be loaded.
    """
    check_memory(folder, dtype, torch.device("cpu"))
    options = {
        "torch_dtype": dtype,
        "variant": variant,
        "use_safetensors": None if legacy else True,
        "local_files_only": True,
    }
    left_out = {} if encode is None else {"unet": None}
    with _named_faults(folder):
        pipeline = pipeline_class(folder.family).from_pretrained(folder.path, **left_out, **options)
        if encode is not None:
            with torch.device("meta"):
                config = DynamiCrafterUNet.from_config(dict(folder.configs["unet"])).config
            pipeline.register_modules(unet=DenoiserToCome(config))
    for part in pipeline.components.values():
        if isinstance(part, torch.nn.Module):
            part.eval()
    if encode is not None:
        encode(pipeline)
        with _named_faults(folder):
            unet = DynamiCrafterUNet.from_pretrained(folder.path / "unet", **options)
        pipeline.register_modules(unet=unet.eval())
    return pipeline


@contextmanager
def _named_faults(folder: PipelineFolder) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, RuntimeError, TypeError, AttributeError, ImportError) as error:
        raise CheckpointError(
            f"{folder.name} cannot be loaded: {first_line(error)}",
            fix="check that the folder is whole, and that diffusers and transformers know it.",
        ) from error


def place(pipeline: Any, folder: PipelineFolder, device: torch.device, dtype: torch.dtype) -> str:
    """Move a pipeline to a device: the whole of it, or part by part while it runs.

    Returns:
        What was done, in words.

    Raises:
        ConfigError: Even the largest part does not fit.
    """
    free = free_memory(device)
    sizes = folder.num_bytes(dtype)
    total, largest = sum(sizes.values()), max(sizes.values(), default=0)
    if device.type == "cpu":
        return f"{gigabytes(total)} of weights in main memory"
    if free is None or total <= SHARE * free:
        pipeline.to(device)
        return f"{gigabytes(total)} of weights on {device}"
    if largest > SHARE * free:
        raise _too_large(folder.name, largest, free, device, what="the largest part")
    pipeline.enable_model_cpu_offload(device=device)
    return (
        f"{gigabytes(total)} of weights, {gigabytes(free)} free on {device}: "
        "its parts take turns there"
    )


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
        fix="load it with --dtype bf16 if it is not yet, close other programs, or use a smaller "
        "model or machine with more memory.",
    )
