"""Which model makes the videos: the one that ships with the package, or a pipeline's folder."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import torch
from accelerate import init_empty_weights
from torch import nn

from motionmerge.io.hashing import hash_file
from motionmerge.merging.inputs.sources import MODULES, hash_origin
from motionmerge.models.pocket.components import (
    add_pocket_adapter,
    build_denoiser,
    pocket_scheduler,
    weights_path,
)
from motionmerge.models.pocket.text import check_prompt
from motionmerge.models.video_pipeline import Scheduler, VideoPipeline
from motionmerge.sampling.families.families import POCKET
from motionmerge.sampling.families.limits import Configs, Limits, VideoFamily
from motionmerge.sampling.pipelines.dynamicrafter import DynamiCrafterPipeline
from motionmerge.sampling.pipelines.pocket import load_pocket
from motionmerge.sampling.request.folder import PipelineFolder
from motionmerge.sampling.request.loading import (
    default_device,
    empty_modules,
    load_pipeline,
    load_scheduler,
    place,
)


class ModelChoice(Protocol):
    """A model that is not loaded yet; `empty_modules` are what experts can switch, on no memory."""

    @property
    def name(self) -> str: ...
    @property
    def path(self) -> Path | None: ...
    @property
    def family(self) -> VideoFamily: ...
    @property
    def limits(self) -> Limits: ...
    @property
    def configs(self) -> Configs: ...
    @property
    def device(self) -> torch.device: ...
    def scheduler(self) -> Scheduler | None: ...
    def fingerprint(self) -> dict[str, object]: ...
    def check_prompt(self, prompt: str) -> None: ...
    def empty_modules(self) -> dict[str, nn.Module]: ...
    def load(
        self, encode: Callable[[VideoPipeline], None] | None = None
    ) -> tuple[VideoPipeline, str]: ...


@dataclass(frozen=True)
class ShippedModel:
    """The pocket model.

    Attributes:
        weights: A shipped variant, or a file of merged weights.
    """

    weights: str = "base"
    name: str = "pocket"
    family: VideoFamily = POCKET
    path: None = None

    @property
    def device(self) -> torch.device:
        """Where it runs."""
        return torch.device("cpu")

    @property
    def limits(self) -> Limits:
        return self.family.limits({})

    @property
    def weights_file(self) -> Path:
        """The weights of U-Net and image projector.

        Raises:
            CheckpointError: No shipped weights have this name.
        """
        return Path(self.weights) if Path(self.weights).suffix else weights_path(self.weights)

    @property
    def configs(self) -> Configs:
        """Of its parts: nothing that is not known."""
        return {}

    def scheduler(self) -> Scheduler | None:
        """Build the scheduler that it denoises with."""
        return pocket_scheduler()

    def fingerprint(self) -> dict[str, object]:
        """Hash its weights."""
        files = (weights_path("towers"), weights_path("decoder"), self.weights_file)
        return {"model": [hash_origin(path) for path in files]}

    def check_prompt(self, prompt: str) -> None:
        """Refuse a prompt that it cannot read.

        Raises:
            DataError: Says what cannot be read.
        """
        check_prompt(prompt)

    def empty_modules(self) -> dict[str, nn.Module]:
        with init_empty_weights():
            unet, projector = build_denoiser()
            add_pocket_adapter(unet)
        return {"unet": unet, "image_projector": projector}

    def load(
        self, encode: Callable[[VideoPipeline], None] | None = None
    ) -> tuple[VideoPipeline, str]:
        """Load it; give the pipeline, and where it is in words.

        Args:
            encode: Called with the pipeline once it can encode.
        """
        pipeline = load_pocket(self.weights)
        if encode is not None:
            encode(pipeline)
        return pipeline, "the pocket model, on the CPU"


@dataclass(frozen=True, kw_only=True)
class FolderModel:
    """A diffusers pipeline.

    Attributes:
        folder: Where it is.
        dtype: Of its weights; by default bf16 on a GPU and fp32 on the CPU.
        device: Where it runs; by default the GPU if there is one.
        variant: See `find_pipeline`.
        legacy: See `find_pipeline`.
    """

    folder: PipelineFolder
    dtype: torch.dtype | None = None
    device: torch.device = field(default_factory=default_device)
    variant: str | None = None
    legacy: bool = False

    @property
    def name(self) -> str:
        return self.folder.name

    @property
    def path(self) -> Path:
        return self.folder.path

    @property
    def family(self) -> VideoFamily:
        return self.folder.family

    @property
    def limits(self) -> Limits:
        return self.folder.limits

    @property
    def configs(self) -> Configs:
        """Of its parts."""
        return self.folder.configs

    def scheduler(self) -> Scheduler | None:
        """Build the scheduler that it denoises with, from its configuration alone.

        Returns:
            None if the folder has none of a class that is installed.
        """
        return load_scheduler(self.folder)

    def fingerprint(self) -> dict[str, object]:
        """Hash its weights, configurations and vocabularies: all that decides its videos."""
        configs = {
            name: {key: value for key, value in config.items() if not key.startswith("_")}
            for name, config in self.folder.configs.items()
        }
        text = json.dumps(configs, sort_keys=True, default=str)
        return {
            "model": self._hash_denoisers(),
            "configs": f"sha256:{hashlib.sha256(text.encode()).hexdigest()}",
            "parts": self.folder.hash_parts(),
            "dtype": str(self.weights_dtype),
        }

    def check_prompt(self, prompt: str) -> None:
        """Accept any prompt: tokenizers read all, and cut what is too long."""

    def empty_modules(self) -> dict[str, nn.Module]:
        return empty_modules(self.folder)

    def _hash_denoisers(self) -> str | dict[str, list[str]]:
        """Hash what the variant names; without one, as a recipe hashes an input."""
        if self.variant is None:
            return hash_origin(self.folder.path)
        chosen = {part: files for part, files in self.folder.weights.items() if part in MODULES}
        return {part: [hash_file(file) for file in files] for part, files in chosen.items()}

    def load(
        self, encode: Callable[[VideoPipeline], None] | None = None
    ) -> tuple[VideoPipeline, str]:
        """Load it; give the pipeline, and where it is in words.

        Args:
            encode: Called with the pipeline once it can encode; on a CPU before DynamiCrafter's
                U-Net is loaded.

        Raises:
            ConfigError: There is not enough memory.
            CheckpointError: A part cannot be loaded.
        """
        dtype = self.weights_dtype
        is_ahead = self.device.type == "cpu" and self.family.is_ours
        pipeline = load_pipeline(
            self.folder,
            dtype=dtype,
            variant=self.variant,
            legacy=self.legacy,
            encode=encode if is_ahead else None,
        )
        if isinstance(pipeline, DynamiCrafterPipeline):
            pipeline.capture_steps()
        placed = place(pipeline, self.folder, self.device, dtype)
        if encode is not None and not is_ahead:
            encode(pipeline)
        return pipeline, placed

    @property
    def weights_dtype(self) -> torch.dtype:
        """Of its weights, once they are loaded."""
        on_cpu = self.device.type == "cpu"
        return self.dtype or (torch.float32 if on_cpu else torch.bfloat16)
