"""The model of a run: its denoiser, what encodes its clips, and the adapter that is added."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoTokenizer, CLIPTextModel

from motionmerge.errors import CheckpointError, ConfigError
from motionmerge.io.json_file import read_json
from motionmerge.models.text_adapters import add_text_adapter
from motionmerge.models.video_pipeline import VideoPipeline
from motionmerge.parameter_groups import FAMILIES, Family
from motionmerge.sampling.pipelines.svd_adapter import SvdAdapterPipeline
from motionmerge.sampling.request.bounded_networks import bounded_layers
from motionmerge.sampling.request.folder import PipelineFolder, first_line
from motionmerge.sampling.request.loading import empty_modules, load_pipeline, load_scheduler

from .clip_encoder import ClipEncoder, DynamiCrafterEncoder, is_told_strides
from .denoisers.choice import FAMILY_DENOISERS, denoiser_for
from .denoisers.dynamicrafter import DynamiCrafterDenoiser
from .denoisers.family import FamilyDenoiser
from .family_encoder import DROPS_IMAGE, SHOWS_PLAIN_LATENTS, FamilyEncoder
from .parameters import TRAINED_GROUPS
from .run_config import RunConfig
from .run_result import NewBase, adapter_of

_WITH_ADAPTER = ("dynamicrafter", "svd", "i2vgen-xl")
_TOWER = ("text_encoder", "tokenizer")
_HAS_ADAPTER = ("temporal_context_dim", "text_adapter")
"""Settings of a U-Net that has an adapter."""

_TOWER_FIX = (
    "Set `adapter.text_encoder` to the folder of a Stable Diffusion or DynamiCrafter: it has "
    "`text_encoder` and `tokenizer` in it."
)


@dataclass(frozen=True)
class RunModel:
    """A model that can be trained.

    Attributes:
        pipeline: Makes videos with it.
        denoiser: Is trained.
        encoder: Encodes clips for it.
        new_base: What was added to the model; None for nothing.
    """

    pipeline: Any
    denoiser: nn.Module
    encoder: ClipEncoder
    new_base: NewBase | None

    @property
    def given_frames(self) -> int:
        """See `FamilyDenoiser`."""
        return getattr(self.denoiser, "given_frames", 0)


def check_model(folder: PipelineFolder, config: RunConfig) -> None:
    """Check that a run goes with its model; no weights are read.

    Raises:
        ConfigError: The model cannot be trained, or not so.
        CheckpointError: There is no text tower where one is needed.
    """
    family, objective = folder.family, config.objective
    made_by = family.pipelines[0]
    known = ("DynamiCrafterPipeline", *FAMILY_DENOISERS)
    if made_by not in known:
        raise ConfigError(
            f"{config.model} is a {made_by}, whose training is unknown.",
            fix=f"Set `model` to a pipeline of one of {', '.join(known)}.",
        )
    _check_adapter(folder, config)
    if objective.drop and family.name not in DROPS_IMAGE:
        raise ConfigError(
            f"`objective.drop` is {objective.drop:g}; the guidance of {family.name} never drops "
            "the image.",
            fix="Leave it out, and set `objective.drop_caption`, such as 0.1.",
        )
    if objective.drop_caption and not (family.takes_text or _adds_adapter(folder, config)):
        raise ConfigError(
            f"`objective.drop_caption` is {objective.drop_caption:g}, and this {family.name} reads "
            "no captions.",
            fix="Leave it out.",
        )
    if 3 * drop_share(folder, config) + objective.drop_caption > 1:
        raise ConfigError(
            "`objective.drop` and `objective.drop_caption` drop more than there is.",
            fix="Keep 3 * drop + drop_caption at most at 1.",
        )
    if objective.time_noise is not None and family.name not in SHOWS_PLAIN_LATENTS:
        raise ConfigError(
            f"`objective.time_noise` is noise on the image's latents, beside which {family.name} "
            "is shown a mask, or which are its first frame.",
            fix=f"Leave it out, or train one of {', '.join(SHOWS_PLAIN_LATENTS)}.",
        )
    _check_views(folder, config)
    if family.name == "dynamicrafter":
        _check_rate(folder, config)
        return
    if objective.interpolates:
        raise ConfigError(
            f"`objective.interpolates` is for DynamiCrafter; {config.model} is a {family.name}.",
            fix="Leave it out.",
        )
    if config.data.condition_frames not in (None, "first"):
        raise ConfigError(
            f"`data.condition_frames` is {config.data.condition_frames}; {family.name} begins with "
            "the image.",
            fix="Leave it out.",
        )


def _check_views(folder: PipelineFolder, config: RunConfig) -> None:
    """Refuse sizes and lengths that a pipeline does not make."""
    limits, name, asked = folder.limits, folder.family.name, config.data.num_frames
    if (near := limits.nearest_num_frames(asked)) != asked:
        raise ConfigError(
            f"`data.num_frames` is {asked}, a length that this {name} does not make.",
            fix=f"Set it to {near}.",
        )
    for size in config.data.sizes if limits.height is not None else ():
        if (fitting := limits.nearest_size(*size)) != size:
            raise ConfigError(
                f"`data.sizes` has {list(size)}, a size that this {name} does not make.",
                fix=f"Write {list(fitting)}.",
            )


def _check_rate(folder: PipelineFolder, config: RunConfig) -> None:
    """Refuse views at a frame rate where DynamiCrafter is told strides."""
    scheduler = load_scheduler(folder)
    if scheduler is not None and is_told_strides(scheduler) and config.data.frame_stride is None:
        raise ConfigError(
            "`data.frame_rate` is given, and this model is told the stride of its frames.",
            fix="Leave it out, and set `data.frame_stride`, such as [1, 6].",
        )


def _check_adapter(folder: PipelineFolder, config: RunConfig) -> None:
    family, tower = folder.family, config.adapter.text_encoder
    adds = _adds_adapter(folder, config)
    if adds and family.name not in _WITH_ADAPTER:
        raise ConfigError(
            f"`trains` is `{config.trains}`, and no adapter can be added to a {family.name}.",
            fix="Set `trains` to another group, such as `all` or `joint`, or to a pattern.",
        )
    needs_tower = adds and not family.takes_text
    if tower is not None and not needs_tower:
        raise ConfigError(
            "`adapter.text_encoder` is given, and nothing in this run would read it.",
            fix="Leave it out.",
        )
    if needs_tower and tower is None:
        raise ConfigError(
            f"{config.model} is a {family.name} without text, and the adapter reads text.",
            fix=_TOWER_FIX,
        )
    if tower is not None:
        _tower_width(tower)


def drop_share(folder: PipelineFolder, config: RunConfig) -> float:
    """Return how often caption and image are dropped, each alone and both."""
    if config.objective.drop is not None:
        return config.objective.drop
    return 0.05 if folder.family.name in DROPS_IMAGE else 0.0


def num_videos(config: RunConfig) -> int:
    """Return of how many held-out clips a validation makes a video."""
    if config.validation is None:
        return 0
    videos = config.validation.videos
    return config.validation.clips if videos is None else min(videos, config.validation.clips)


def groups_of(folder: PipelineFolder) -> Family:
    """Return the parameter groups of a model."""
    return next(one for one in FAMILIES if one.name == folder.family.name)


def empty_denoiser(folder: PipelineFolder, config: RunConfig) -> nn.Module:
    """Build what is trained without memory for it; its parameters have the denoiser's names."""
    parts = empty_modules(folder)
    if _adds_adapter(folder, config):
        _add_adapter(parts, config)
    return nn.ModuleDict(parts)


def load_model(folder: PipelineFolder, config: RunConfig, *, dtype: torch.dtype) -> RunModel:
    """Load the model of a run, and give it the adapter that it is to be trained with.

    Raises:
        ConfigError: Memory does not do, or views are none that the model takes.
        CheckpointError: A part cannot be loaded.
    """
    pipeline: Any = load_pipeline(folder, dtype=dtype)
    tower: Mapping[str, Any] = {}
    adds = _adds_adapter(folder, config)
    if adds:
        if config.adapter.text_encoder is not None:
            tower = _load_tower(config.adapter.text_encoder, dtype)
        _add_adapter(pipeline.components, config)
        if tower:
            pipeline = SvdAdapterPipeline.around(pipeline, **tower)
    views = config.data.view_settings(seed=config.settings.seed)
    denoiser = denoiser_for(pipeline)
    encoder: ClipEncoder
    if isinstance(denoiser, DynamiCrafterDenoiser):
        encoder = DynamiCrafterEncoder(pipeline)
    else:
        assert isinstance(denoiser, FamilyDenoiser)
        encoder = FamilyEncoder(pipeline, denoiser, folder=folder, settings=views)
    new_base = _new_base(folder, config, pipeline, tower) if adds else None
    return RunModel(pipeline=pipeline, denoiser=denoiser, encoder=encoder, new_base=new_base)


def _adds_adapter(folder: PipelineFolder, config: RunConfig) -> bool:
    groups = TRAINED_GROUPS.get(config.trains, (config.trains,))
    unet = folder.configs.get("unet", {})
    return "adapter" in groups and not any(unet.get(name) is not None for name in _HAS_ADAPTER)


def _add_adapter(parts: Mapping[str, Any], config: RunConfig) -> None:
    unet = parts["unet"]
    made = {"num_frames": config.data.num_frames, "seed": config.settings.seed}
    if hasattr(unet, "add_temporal_adapter"):
        unet.add_temporal_adapter(**made)
        return
    tower = config.adapter.text_encoder
    width = unet.config.cross_attention_dim if tower is None else _tower_width(tower)
    add_text_adapter(unet, text_dim=width, **made)


def _new_base(
    folder: PipelineFolder, config: RunConfig, pipeline: VideoPipeline, tower: Mapping[str, Any]
) -> NewBase:
    unet: Any = pipeline.components["unet"]
    files, folders = {"unet/config.json": unet.to_json_string()}, {}
    if folder.family.name != "dynamicrafter":  # there, the U-Net with adapter is another class
        index = {
            **folder.configs[""],
            "_class_name": type(pipeline).__name__,
            "unet": [type(unet).__module__, type(unet).__name__],
            **{name: ["transformers", type(part).__name__] for name, part in tower.items()},
        }
        files["model_index.json"] = json.dumps(index, indent=2) + "\n"
    if (source := config.adapter.text_encoder) is not None:
        folders = {name: source / name for name in _TOWER}
    return NewBase(tensors=adapter_of(unet), files=files, folders=folders)


def _tower_width(folder: Path) -> int:
    """Read the width of a text tower's tokens."""
    missing = [name for name in _TOWER if not (folder / name).is_dir()]
    if missing:
        raise CheckpointError(
            f"`adapter.text_encoder` is {folder}, in which there is no folder `{missing[0]}`.",
            fix=_TOWER_FIX,
        )
    if not any((folder / "text_encoder").glob("*.safetensors")):
        raise CheckpointError(
            f"{folder / 'text_encoder'} holds no safetensors.",
            fix="Download it again; its weights have to be safetensors.",
        )
    config = read_json(folder / "text_encoder" / "config.json")
    width = config.get("hidden_size")
    if config.get("model_type") != "clip_text_model" or not isinstance(width, int):
        raise CheckpointError(
            f"{folder / 'text_encoder'} is no CLIP text tower, but a {config.get('model_type')}.",
            fix=_TOWER_FIX,
        )
    return width


def _load_tower(folder: Path, dtype: torch.dtype) -> dict[str, Any]:
    """Load a text tower and its tokenizer; nothing is downloaded, and no code of theirs is run.

    Raises:
        CheckpointError: They cannot be loaded.
    """
    try:
        with bounded_layers(f"`text_encoder` of {folder}"):
            tower = CLIPTextModel.from_pretrained(
                folder / "text_encoder", dtype=dtype, local_files_only=True, use_safetensors=True
            )
        tokenizer = AutoTokenizer.from_pretrained(
            folder / "tokenizer", local_files_only=True, trust_remote_code=False
        )
    except (OSError, ValueError, RuntimeError, LookupError, TypeError) as error:
        raise CheckpointError(
            f"The text tower in {folder} cannot be loaded: {first_line(error)}",
            fix="Check that the folder is whole; its weights have to be safetensors.",
        ) from error
    return {"text_encoder": tower.eval(), "tokenizer": tokenizer}
