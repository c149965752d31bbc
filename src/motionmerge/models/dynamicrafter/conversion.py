"""Official DynamiCrafter weights to our classes and back, tensor by tensor.

Official: `lvdm/models/ddpm3d.py` (one checkpoint holds the U-Net, the autoencoder, both OpenCLIP
towers, the image projector and the buffers of the noise schedule). Nothing is computed but three
things: convolutions over one point become linear layers, fused projections are cut into queries,
keys and values, and the learned image scale of the 256 model is folded into its `to_v_ip`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import init_empty_weights
from diffusers import AutoencoderKL
from torch import nn
from transformers import CLIPTextModel, CLIPVisionModel
from transformers import __version__ as TRANSFORMERS

from motionmerge.dynamicrafter_names import (
    count_indices,
    unet_layout_of_official,
    unet_layout_of_ours,
)
from motionmerge.errors import CheckpointError, ConfigError
from motionmerge.io.quantised import refuse_quantised
from motionmerge.io.weights import open_weights

from . import key_maps, official_config
from .encoders import image_encoder_config, text_encoder_config
from .image_projector import ImageProjector
from .key_maps import KeyMap
from .lazy_tensors import LazyTensor, LazyTensors, lazy_tensors, to_official, to_ours
from .official_config import OfficialShapes, unet_config_from_official
from .scheduler import DynamicRescaleDDIMScheduler
from .unet import DynamiCrafterUNet

__all__ = [
    "COMPONENTS",
    "Component",
    "OfficialCheckpoint",
    "convert_unet_state_dict",
    "from_original",
    "unconvert_unet_state_dict",
    "unet_config_from_official",
]

SCHEDULE_BUFFERS = (
    "betas",
    "alphas_cumprod",
    "alphas_cumprod_prev",
    "sqrt_alphas_cumprod",
    "sqrt_one_minus_alphas_cumprod",
    "log_one_minus_alphas_cumprod",
    "sqrt_recip_alphas_cumprod",
    "sqrt_recipm1_alphas_cumprod",
    "posterior_variance",
    "posterior_log_variance_clipped",
    "posterior_mean_coef1",
    "posterior_mean_coef2",
    "scale_arr",
)
_UNET_PREFIX = "model.diffusion_model."
_LEARNED_SCALE = ".attn2.alpha"
_ADAPTER_PREFIXES = ("queries", "qformer.")  # beside the official U-Net, not in it


@dataclass(frozen=True, kw_only=True)
class Component:
    """One model inside an official checkpoint.

    Attributes:
        name: Its attribute in the pipeline and its folder.
        prefix: What its official names start with.
        saved_prefix: What its names start with in our folder (the older layout of transformers'
            CLIP models, which old and new versions read).
        file: Name of its weights file in our folder.
        official_map: Makes the key map from official shapes.
        our_map: Makes the key map from our shapes.
        config: Reads the configuration off official shapes.
        build: Makes the module from the configuration.
    """

    name: str
    prefix: str
    official_map: Callable[[OfficialShapes], KeyMap]
    our_map: Callable[[OfficialShapes], KeyMap]
    config: Callable[[OfficialShapes], dict[str, Any]]
    build: Callable[..., nn.Module]
    saved_prefix: str = ""
    file: str = "diffusion_pytorch_model.safetensors"

    def short_name(self, official: str) -> str | None:
        """Return the official name inside this component; None for another component's tensor."""
        if self.prefix == _UNET_PREFIX and official.startswith(_ADAPTER_PREFIXES):
            return official
        return official.removeprefix(self.prefix) if official.startswith(self.prefix) else None

    def long_name(self, short: str) -> str:
        """Return the official name in the whole checkpoint."""
        if self.prefix == _UNET_PREFIX and short.startswith(_ADAPTER_PREFIXES):
            return short
        return f"{self.prefix}{short}"

    def inner(self, module: nn.Module) -> nn.Module:
        """Return the module that our names start from; transformers < 5.6 wraps its CLIP models."""
        wrapper = self.saved_prefix.rstrip(".")
        return getattr(module, wrapper, module) if wrapper else module

    def empty_module(self, config: Mapping[str, Any]) -> nn.Module:
        """Build the module without memory for its parameters."""
        with init_empty_weights():
            return self.build(**config)


def _build_text_encoder(**config: Any) -> nn.Module:
    return _unwrapped(CLIPTextModel(text_encoder_config(**config)))


def _build_image_encoder(**config: Any) -> nn.Module:
    return _unwrapped(CLIPVisionModel(image_encoder_config(**config)))


COMPONENTS = (
    Component(
        name="unet",
        prefix=_UNET_PREFIX,
        official_map=lambda s: key_maps.unet_key_map(**unet_layout_of_official(s)),
        our_map=lambda s: key_maps.unet_key_map(**unet_layout_of_ours(s)),
        config=official_config.unet_config_from_shapes,
        build=DynamiCrafterUNet,
    ),
    Component(
        name="vae",
        prefix="first_stage_model.",
        official_map=lambda s: key_maps.vae_key_map(
            num_levels=count_indices(s, r"encoder\.down\.(\d+)\.")
        ),
        our_map=lambda s: key_maps.vae_key_map(
            num_levels=count_indices(s, r"encoder\.down_blocks\.(\d+)")
        ),
        config=official_config.vae_config_from_shapes,
        build=AutoencoderKL,
    ),
    Component(
        name="text_encoder",
        prefix="cond_stage_model.model.",
        official_map=lambda s: key_maps.text_encoder_key_map(
            layers=count_indices(s, r"transformer\.resblocks\.(\d+)\.") - 1
        ),
        our_map=lambda s: key_maps.text_encoder_key_map(
            layers=count_indices(s, r"encoder\.layers\.(\d+)")
        ),
        config=official_config.text_encoder_config_from_shapes,
        build=_build_text_encoder,
        saved_prefix="text_model.",
        file="model.safetensors",
    ),
    Component(
        name="image_encoder",
        prefix="embedder.model.visual.",
        official_map=lambda s: key_maps.image_encoder_key_map(
            layers=count_indices(s, r"transformer\.resblocks\.(\d+)\.")
        ),
        our_map=lambda s: key_maps.image_encoder_key_map(
            layers=count_indices(s, r"encoder\.layers\.(\d+)")
        ),
        config=official_config.image_encoder_config_from_shapes,
        build=_build_image_encoder,
        saved_prefix="vision_model.",
        file="model.safetensors",
    ),
    Component(
        name="image_projector",
        prefix="image_proj_model.",
        official_map=lambda s: key_maps.image_projector_key_map(
            depth=count_indices(s, r"layers\.(\d+)\.")
        ),
        our_map=lambda s: key_maps.image_projector_key_map(
            depth=count_indices(s, r"layers\.(\d+)\.")
        ),
        config=official_config.image_projector_config_from_shapes,
        build=ImageProjector,
    ),
)


@dataclass(frozen=True)
class ConvertedComponent:
    """A component with the tensors it gets from an official checkpoint.

    Attributes:
        component: Which one.
        official: Its official tensors by their names inside it.
        tensors: The same under our names.
        unused: Official tensors inside it that our class has no place for.
    """

    component: Component
    official: LazyTensors
    tensors: LazyTensors
    unused: LazyTensors

    @property
    def num_parameters(self) -> int:
        """Number of elements of all tensors."""
        return sum(torch.Size(tensor.shape).numel() for tensor in self.tensors.values())

    def config(self, overrides: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """Read the configuration off the shapes; `overrides` wins."""
        return {**self.component.config(_shapes(self.official)), **(overrides or {})}

    def load(self, config: Mapping[str, Any]) -> nn.Module:
        """Build the module with its weights, ready for inference."""
        module = self.component.empty_module(config)
        state = {name: tensor.read() for name, tensor in self.tensors.items()}
        self.component.inner(module).load_state_dict(state, assign=True)
        return module.eval()


class OfficialCheckpoint:
    """The tensors of an official checkpoint, sorted into components.

    Attributes:
        components: The components that are there, by name.
        configs: Their configurations.
        unused: What no component takes, by official name: schedule buffers, the last layer and the
            heads of the text tower, the text tower that comes with the vision tower, the vision
            tower's head. A learned image scale that was folded into the weights is here as 0.

    Args:
        tensors: Lazily read tensors. Wrapper prefixes (`_forward_module.`) and old spellings
            (`framestride_embed`) are understood, and a U-Net alone without its prefix.
        overrides: Configuration values by component, for what shapes do not tell.

    Raises:
        CheckpointError: there is nothing known in it, U-Net tensors are left over, or shapes do not
            fit the classes.
    """

    def __init__(
        self,
        tensors: Mapping[str, LazyTensor],
        *,
        overrides: Mapping[str, Mapping[str, Any]] | None = None,
    ) -> None:
        tensors = _canonical_names(tensors)
        self.components: dict[str, ConvertedComponent] = {}
        self.configs: dict[str, dict[str, Any]] = {}
        self.unused = {name: t for name, t in tensors.items() if _is_outside_components(name)}
        for component in COMPONENTS:
            if not any(name.startswith(component.prefix) for name in tensors):
                continue
            converted = _convert_component(component, tensors)
            config = converted.config((overrides or {}).get(component.name))
            _check_fit(converted, config)
            self.components[component.name] = converted
            self.configs[component.name] = config
            for short, tensor in converted.unused.items():
                self.unused[component.long_name(short)] = tensor
        if not self.components:
            raise CheckpointError(
                "None of the tensors belongs to a DynamiCrafter checkpoint"
                + (f"; the first is `{next(iter(tensors))}`" if tensors else ""),
                fix="Convert an official checkpoint of the 256, 512 or 1024 family.",
            )

    def scheduler_config(self) -> dict[str, Any]:
        """Return the arguments of `DynamicRescaleDDIMScheduler` that the schedule buffers tell."""
        names = [name for name in ("alphas_cumprod", "scale_arr") if name in self.unused]
        buffers: dict[str, torch.Tensor] = {name: self.unused[name].read() for name in names}
        if official_config.is_videocrafter(self.configs.get("unet", {})):
            return official_config.videocrafter_scheduler_config(buffers)
        return official_config.scheduler_config_from_buffers(buffers)

    @property
    def pipeline(self) -> str:
        """Name of the pipeline's class that makes videos with it."""
        is_videocrafter = official_config.is_videocrafter(self.configs.get("unet", {}))
        return "VideoCrafterPipeline" if is_videocrafter else "DynamiCrafterPipeline"


def convert_unet_state_dict(official: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Rename an official U-Net's tensors for `DynamiCrafterUNet.load_state_dict`.

    Args:
        official: The U-Net's tensors, with or without `model.diffusion_model.` in front of their
            names; from a whole checkpoint only they are taken. The text-to-temporal adapter comes
            along: `cc_projection` in the U-Net, `queries` and `qformer.*` beside it.

    Returns:
        Our names with the same tensors; no data is copied except a folded `to_v_ip`.

    Raises:
        CheckpointError: a U-Net tensor is unknown, or this is no DynamiCrafter U-Net.
    """
    tensors = _canonical_names({name: LazyTensor.of(value) for name, value in official.items()})
    converted = _convert_component(COMPONENTS[0], tensors)
    return {name: tensor.read() for name, tensor in converted.tensors.items()}


def unconvert_unet_state_dict(ours: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Undo `convert_unet_state_dict`: official names without `model.diffusion_model.`.

    Raises:
        CheckpointError: a tensor is unknown.
    """
    tensors = {name: LazyTensor.of(value) for name, value in ours.items()}
    official = unconvert_component(COMPONENTS[0], tensors)
    return {name: tensor.read() for name, tensor in official.items()}


def unconvert_component(component: Component, tensors: LazyTensors) -> LazyTensors:
    """Rename a component's tensors to their official names inside it.

    Raises:
        CheckpointError: a tensor is unknown.
    """
    pairs, unknown = component.our_map(_shapes(tensors)).pair_ours(tensors)
    _refuse_unknown(component, unknown)
    return to_official(tensors, pairs)


def _unwrapped(tower: nn.Module) -> nn.Module:
    """Return a tower whose tensors have the names that we map official ones to.

    Raises:
        ConfigError: transformers is older than 5.6 and has other names.
    """
    if hasattr(tower, "text_model") or hasattr(tower, "vision_model"):
        raise ConfigError(
            f"DynamiCrafter's towers need transformers 5.6 or newer; this is {TRANSFORMERS}.",
            fix="Run `pip install 'transformers>=5.6'`.",
        )
    return tower


def from_original(
    path: str | Path,
    *,
    subset: Literal["all", "unet"] = "all",
    overrides: Mapping[str, Mapping[str, Any]] | None = None,
) -> dict[str, Any]:
    """Load an official checkpoint file into our classes.

    Args:
        path: `model.ckpt` of DynamiCrafter or VideoCrafter's image-to-video model, of their
            fine-tunes, or a safetensors version.
        subset: Which components to load.
        overrides: Configuration values by component, for what shapes do not tell.

    Returns:
        Components by name; the scheduler comes with "all":
        `DynamiCrafterPipeline(**from_original(path), tokenizer=load_tokenizer(...))`, or
        `VideoCrafterPipeline` for a file of VideoCrafter's image-to-video model.

    Raises:
        CheckpointError: the file cannot be read, is of another family, or lacks a U-Net.
    """
    with open_weights(path) as reader:
        refuse_quantised(reader, reader.metadata, called=str(path))
        checkpoint = OfficialCheckpoint(lazy_tensors(reader), overrides=overrides)
        names = list(checkpoint.components) if subset == "all" else [subset]
        if not set(names) <= set(checkpoint.components):
            raise CheckpointError(
                f"{path} holds {', '.join(checkpoint.components)}, but no U-Net.",
                fix="Load a checkpoint with `model.diffusion_model.*`.",
            )
        loaded: dict[str, Any] = {
            name: checkpoint.components[name].load(checkpoint.configs[name]) for name in names
        }
        if subset == "all":
            loaded["scheduler"] = DynamicRescaleDDIMScheduler(**checkpoint.scheduler_config())
        return loaded


def _canonical_names(tensors: Mapping[str, LazyTensor]) -> LazyTensors:
    """Undo wrappers and old spellings; put a U-Net that comes alone where it belongs."""
    names = {
        name: name.removeprefix("_forward_module.").replace("framestride_embed", "fps_embedding")
        for name in tensors
    }
    if "init_attn.0.norm.weight" in names.values():
        names = {name: COMPONENTS[0].long_name(new) for name, new in names.items()}
    return {new: tensors[name] for name, new in names.items()}


def _is_outside_components(name: str) -> bool:
    return all(component.short_name(name) is None for component in COMPONENTS)


def _shapes(tensors: LazyTensors) -> OfficialShapes:
    return {name: tensor.shape for name, tensor in tensors.items()}


def _convert_component(component: Component, tensors: LazyTensors) -> ConvertedComponent:
    own = {
        short: tensor
        for name, tensor in tensors.items()
        if (short := component.short_name(name)) is not None
    }
    scales = [name for name in own if name.endswith(_LEARNED_SCALE)]
    folded = _fold_learned_image_scales(own, scales)
    pairs, left_over = component.official_map(_shapes(own)).pair_official(folded)
    if component.prefix == _UNET_PREFIX:
        _refuse_unknown(component, left_over)
    unused = {name: own[name] for name in left_over}
    unused |= {name: LazyTensor.of(torch.zeros(own[name].shape)) for name in scales}
    return ConvertedComponent(component, own, to_ours(folded, pairs), unused)


def _fold_learned_image_scales(tensors: LazyTensors, scales: Sequence[str]) -> LazyTensors:
    """Multiply `to_v_ip` of the 256 model by its learned scale, `1 + tanh(alpha)`."""

    def fold(value: LazyTensor, alpha: LazyTensor) -> torch.Tensor:
        scale = 1 + alpha.read().float().tanh()
        return (value.read().float() * scale).to(value.dtype)

    folded = {name: tensor for name, tensor in tensors.items() if name not in scales}
    for name in scales:
        target = name.removesuffix("alpha") + "to_v_ip.weight"
        value = tensors[target]
        folded[target] = LazyTensor(value.dtype, value.shape, partial(fold, value, tensors[name]))
    return folded


def _refuse_unknown(component: Component, names: Sequence[str]) -> None:
    if names:
        raise CheckpointError(
            f"{len(names)} tensors of the {component.name} have no known place, e.g. `{names[0]}`.",
            fix="Convert weights of the DynamiCrafter 256, 512 or 1024 family, unchanged in their "
            "structure.",
        )


def _check_fit(converted: ConvertedComponent, config: Mapping[str, Any]) -> None:
    """Compare names and shapes with the module that the configuration builds."""
    module = converted.component.empty_module(config)
    inner = converted.component.inner(module)
    expected = {name: tuple(tensor.shape) for name, tensor in inner.state_dict().items()}
    found = _shapes(converted.tensors)
    wrong = [
        f"`{name}`: {list(found.get(name, ())) or 'missing'}, expected {list(expected[name])}"
        for name in expected
        if expected[name] != found.get(name)
    ]
    wrong += [f"`{name}`: unexpected" for name in found if name not in expected]
    if wrong:
        raise CheckpointError(
            f"{len(wrong)} tensors of the {converted.component.name} do not fit "
            f"{type(module).__name__}: {'; '.join(wrong[:3])}",
            fix="Check that the file is whole; give `overrides` for settings that shapes do not "
            "tell.",
        )
