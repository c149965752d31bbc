"""LoRAs of a pipeline's U-Net, loaded, mixed, fused and swapped by diffusers' method names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NoReturn

import torch
from diffusers import ModelMixin
from diffusers.loaders.lora_base import LORA_WEIGHT_NAME_SAFE, LoraBaseMixin
from peft import LoraConfig

from motionmerge.errors import ConfigError, ShapeError
from motionmerge.models.diffusers_state import waits_in_files
from motionmerge.switching.expert_bank import attached_bank
from motionmerge.switching.lora_bank import fits_layer, lora_config
from motionmerge.switching.lora_layers import LoraLayer, LoraSource, read_lora


class LoraPipeline(LoraBaseMixin):  # type: ignore[misc]  # diffusers is untyped here
    """A pipeline with LoRAs on its U-Net.

    `set_adapters`, `delete_adapters`, `fuse_lora`, `unload_lora_weights`, `enable_lora_hotswap` and
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
        if isinstance(source, (str, Path)) and (Path(source).is_dir() or weight_name):
            source = Path(source) / (weight_name or LORA_WEIGHT_NAME_SAFE)
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

    def fuse_lora(self, components: Sequence[str] = ("unet",), **options: object) -> None:
        """Add the LoRAs to the weights; the options are diffusers'."""
        super().fuse_lora(components=list(components), **options)

    def unfuse_lora(self, components: Sequence[str] = ("unet",), **options: object) -> None:
        """Take the LoRAs out of the weights again, up to rounding."""
        super().unfuse_lora(components=list(components), **options)

    @classmethod
    def save_lora_weights(cls, *arguments: object, **options: object) -> NoReturn:
        """Refuse to write a LoRA without the settings that its strength depends on.

        Raises:
            ConfigError: Always.
        """
        raise ConfigError(
            f"{cls.__name__} does not save LoRAs: their tensors alone do not hold their strength.",
            fix='Call `pipeline.unet.save_lora_adapter("FOLDER", adapter_name=...)`.',
        )


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
