"""LoRAs of a pipeline's U-Net, loaded, mixed, fused and swapped by diffusers' method names."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from numbers import Real
from pathlib import Path
from typing import Any, TypeAlias

import torch
from diffusers import ModelMixin
from diffusers.loaders.lora_base import LORA_WEIGHT_NAME, LORA_WEIGHT_NAME_SAFE, LoraBaseMixin
from peft import LoraConfig
from peft.tuners.tuners_utils import BaseTunerLayer

from motionmerge.errors import ConfigError, DataError, ShapeError
from motionmerge.io.atomic import atomic_path, disk_errors
from motionmerge.io.weights import open_weights
from motionmerge.merging.lora.settings import settings_in_header
from motionmerge.models.diffusers_state import waits_in_files
from motionmerge.switching.expert_bank import attached_bank
from motionmerge.switching.lora_bank import fits_layer, lora_config
from motionmerge.switching.lora_layers import LoraLayer, LoraSource, read_lora

LoraWeights: TypeAlias = "float | Mapping[str, object] | list[Any] | None"
"""A weight, weights by parts of names, or one of these for each LoRA."""


class LoraPipeline(LoraBaseMixin):  # type: ignore[misc]  # diffusers is untyped here
    """A pipeline with LoRAs on its U-Net.

    `delete_adapters`, `fuse_lora`, `unload_lora_weights`, `enable_lora_hotswap` and
    all else are diffusers' own. Files are read as everywhere here, whatever style they are in.
    """

    unet: ModelMixin
    _lora_loadable_modules = ("unet",)

    def load_lora_weights(
        self,
        source: LoraSource,
        adapter_name: str | None = None,
        hotswap: bool = False,
        *,
        weight_name: str | None = None,
        low_cpu_mem_usage: bool = False,
    ) -> None:
        """Add a LoRA to the U-Net, or put it in the place of one that is there.

        The U-Net's own parameters stay as trainable as they were: torch chooses kernels by that, so
        that with weight 0 a LoRA would change the last bit.

        Args:
            source: A file, a folder with one, or tensors by their names.
            adapter_name: What to call it; by default `default_0` and so on.
            hotswap: Replace the LoRA of this name, so that what is compiled stays so.
            weight_name: Which file of the folder; by default `pytorch_lora_weights.safetensors`.
            low_cpu_mem_usage: See diffusers.

        Raises:
            CheckpointError: It is no LoRA, or has layers that the U-Net has not.
            ShapeError: A matrix does not fit its layer.
            ConfigError: Experts are attached, or the U-Net's weights wait in files.
        """
        unet = self.unet
        if attached_bank(unet) is not None:
            raise ConfigError(
                "Experts are attached, whose weights a LoRA would change.",
                fix="Load it before, or after leaving the `with experts(...)` block.",
            )
        if waits_in_files(unet):
            raise ConfigError(
                "The U-Net's weights wait in files (group offload), and loading would lose them.",
                fix="Load LoRAs first, then call enable_group_offload().",
            )
        if isinstance(source, (str, Path)):
            source = _file_of(source, weight_name)
        read = read_lora(source, {"unet": unet}, name=adapter_name or "lora")
        layers = read.layers["unet"]
        config = lora_config(layers)
        trainable = {one: one.requires_grad for one in unet.parameters()}
        unet.load_lora_adapter(
            _tensors(layers, unet, with_bias=config.lora_bias),
            prefix=None,
            adapter_name=adapter_name,
            hotswap=hotswap,
            metadata=_settings(config),
            low_cpu_mem_usage=low_cpu_mem_usage,
            _pipeline=self,
        )
        for one in unet.parameters():
            one.requires_grad_(trainable.get(one, False))

    def set_adapters(
        self, adapter_names: str | Sequence[str], adapter_weights: LoraWeights = None
    ) -> None:
        """Use LoRAs, each with a weight, or with weights by parts of its layers' names.

            pipeline.set_adapters("style", 0.5)
            pipeline.set_adapters("style", {"unet": {"down": 0.5, "mid": 0.0}})

        The first part that is in a layer's name counts; layers with none of them have weight 1.

        Raises:
            ConfigError: A part is in no layer's name, or has no number: diffusers knows weights of
                single blocks for its image U-Nets alone.
        """
        several = adapter_weights if isinstance(adapter_weights, list) else [adapter_weights]
        for given in several:
            own = given.get("unet") if isinstance(given, Mapping) else None
            if isinstance(own, Mapping):
                _check_parts(own, self.unet)
        super().set_adapters(adapter_names, adapter_weights)

    def fuse_lora(self, components: Sequence[str] = ("unet",), **options: object) -> None:
        """Add the LoRAs to the weights; the options are diffusers'."""
        super().fuse_lora(components=list(components), **options)

    def unfuse_lora(self, components: Sequence[str] = ("unet",), **options: object) -> None:
        """Take the LoRAs out of the weights again, up to rounding."""
        super().unfuse_lora(components=list(components), **options)

    @classmethod
    def save_lora_weights(
        cls,
        save_directory: str | Path,
        unet_lora_layers: Mapping[str, torch.Tensor] | torch.nn.Module,
        *,
        unet_lora_adapter_metadata: Mapping[str, object] | None = None,
        weight_name: str | None = None,
        safe_serialization: bool = True,
    ) -> None:
        """Write a LoRA of the U-Net as diffusers' pipelines do; the file appears when it is whole.

        Args:
            save_directory: The folder; a file of this name in it is replaced.
            unet_lora_layers: Its tensors, as `peft.get_peft_model_state_dict(pipeline.unet)` has
                them.
            unet_lora_adapter_metadata: `pipeline.unet.peft_config[NAME].to_dict()`. Without it the
                file says nothing of alpha, and whoever loads it takes the rank.
            weight_name: By default `pytorch_lora_weights.safetensors`.
            safe_serialization: False writes a pickle, which holds no metadata.

        Raises:
            ConfigError: There are no tensors, or metadata for a pickle.
            DataError: The file cannot be written.
        """
        layers = cls.pack_weights(unet_lora_layers, "unet")
        if not layers:
            raise ConfigError(
                "There are no LoRA tensors to save.",
                fix="Pass `unet_lora_layers=peft.get_peft_model_state_dict(pipeline.unet)`.",
            )
        if unet_lora_adapter_metadata and not safe_serialization:
            raise ConfigError(
                "A pickle cannot hold `unet_lora_adapter_metadata`.",
                fix="Leave `safe_serialization` out.",
            )
        if not unet_lora_adapter_metadata and not any(name.endswith(".alpha") for name in layers):
            warnings.warn(
                "The LoRA is saved without `unet_lora_adapter_metadata`: it will be loaded with "
                "its rank as alpha. Pass `pipeline.unet.peft_config[NAME].to_dict()` if alpha is "
                "another number.",
                stacklevel=2,
            )
        default = LORA_WEIGHT_NAME_SAFE if safe_serialization else LORA_WEIGHT_NAME
        path = Path(save_directory) / (weight_name or default)
        with disk_errors(DataError, path), atomic_path(path) as temporary:
            cls._save_lora_weights(
                save_directory=temporary.parent,
                lora_layers={"unet": unet_lora_layers},
                lora_metadata={"unet": unet_lora_adapter_metadata},
                weight_name=temporary.name,
                safe_serialization=safe_serialization,
            )

    @classmethod
    def lora_state_dict(
        cls,
        source: str | Path,
        *,
        weight_name: str | None = None,
        return_lora_metadata: bool = False,
    ) -> object:
        """Read the tensors of a LoRA by the names in its file, as training scripts go on with them.

        Args:
            source: A file, or a folder with one.
            weight_name: As of `load_lora_weights`.
            return_lora_metadata: Return the settings in the file's header too; None if it has none.

        Returns:
            `{name: tensor}`, or a pair of that and the settings.

        Raises:
            CheckpointError: It cannot be read.
        """
        path = _file_of(source, weight_name)
        with open_weights(path) as reader:
            tensors = {name: reader.read(name) for name in reader.keys()}  # noqa: SIM118
            settings = settings_in_header(reader.metadata, where=str(path))
        return (tensors, settings or None) if return_lora_metadata else tensors


def _check_parts(weights: Mapping[str, object], unet: torch.nn.Module) -> None:
    """Refuse weights by parts of names that diffusers would leave out, or break off at."""
    layers = [name for name, one in unet.named_modules() if isinstance(one, BaseTunerLayer)]
    for part, weight in weights.items():
        if not isinstance(weight, Real) or not any(part in name for name in layers):
            raise ConfigError(
                f"The weights of LoRA layers have {part!r}: {weight!r}; expected a part of a "
                "layer's name, and a number.",
                fix=f"Use names such as {layers[0]!r}, or parts of them."
                if layers
                else "Load a LoRA first.",
            )


def _file_of(source: str | Path, weight_name: str | None) -> Path:
    """Return the file itself, or the one of this name in a folder."""
    path = Path(source)
    return path / (weight_name or LORA_WEIGHT_NAME_SAFE) if path.is_dir() or weight_name else path


_SETTINGS = ("r", "lora_alpha", "target_modules", "rank_pattern", "alpha_pattern", "lora_bias")


def _settings(config: LoraConfig) -> dict[str, object]:
    """Return what differs between LoRAs, as diffusers passes it on."""
    return {name: getattr(config, name) for name in _SETTINGS}


def _tensors(
    layers: Mapping[str, LoraLayer], unet: ModelMixin, *, with_bias: bool
) -> dict[str, torch.Tensor]:
    """Name the matrices as PEFT does.

    Raises:
        ShapeError: A matrix does not fit its layer.
    """
    named: dict[str, torch.Tensor] = {}
    for name, layer in layers.items():
        child = unet.get_submodule(name)
        weight = getattr(child, "base_layer", child).weight
        shapes = [(layer.rank, *weight.shape[1:]), (weight.shape[0], layer.rank)]
        down, up = layer.down, layer.up
        if weight.ndim > 2:
            shapes[1] = (*shapes[1], *[1] * (weight.ndim - 2))
        for matrix, shape in zip((down, up), shapes, strict=True):
            if not fits_layer(matrix, torch.empty(shape, device="meta")):
                raise ShapeError(
                    f"`{name}` of the LoRA has shape {list(matrix.shape)}; the U-Net's layer needs "
                    f"{list(shape)}.",
                    fix="Use a LoRA that was trained on this model.",
                )
        named[f"{name}.lora_A.weight"] = down.reshape(shapes[0])
        named[f"{name}.lora_B.weight"] = up.reshape(shapes[1])
        if with_bias:
            bias = torch.zeros(weight.shape[0]) if layer.bias is None else layer.bias
            named[f"{name}.lora_B.bias"] = bias
    return named
