"""Which parameters of a denoiser are trained: groups by name as in recipes, whole or as LoRA.

Trained parameters are fp32, whatever the model is loaded in: AdamW at 1e-5 moves 6 % of bf16
parameters in 20 steps, and all of them in fp32. What is frozen keeps its dtype.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer
from pydantic import Field
from torch import nn

from motionmerge.errors import ConfigError, MotionMergeError
from motionmerge.merging.algebra.groups import count_parameters, group_of, selects
from motionmerge.merging.lora.settings import MODULES_KEY
from motionmerge.parameter_groups import Family
from motionmerge.rng import whole_number_for

from .config_file import ConfigSection

TRAINED_GROUPS: Mapping[str, tuple[str, ...]] = {
    "adapter": ("adapter", "temporal"),
    "adapter-only": ("adapter",),
}
"""What trains other groups than the one it is called."""

_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
_PEFT_NAME = "default"


class LoraShape(ConfigSection):
    """The pairs of matrices that are trained beside the layers of a group.

    Args:
        rank: Of the product.
        alpha: The product is multiplied by alpha / rank; by default they are equal.
        dropout: Of the layer's input, while training.
    """

    rank: int = Field(16, ge=1, le=4096)
    alpha: float | None = Field(None, gt=0, le=1e6)
    dropout: float = Field(0.0, ge=0, lt=1)


@dataclass(frozen=True, kw_only=True)
class Trained:
    """The parameters of a denoiser that are trained.

    Args:
        parameters: For the optimizer, in the order of `names`.
        names: In the denoiser.
        counts: How many numbers of each parameter group.
    """

    parameters: tuple[nn.Parameter, ...]
    names: tuple[str, ...]
    counts: Mapping[str, int]


def choose_parameters(
    denoiser: nn.Module,
    family: Family,
    trains: str = "adapter",
    *,
    lora: LoraShape | None = None,
    seed: int = 0,
) -> Trained:
    """Choose what is trained, make it fp32 in place, and freeze all else.

    Args:
        denoiser: Its submodules are called as in a pipeline (`unet`, `image_projector`).
        family: Of the denoiser.
        trains: "adapter" (adapter and temporal blocks), "adapter-only", "all", or what `only(...)`
            of a recipe takes: a group, a glob such as `*.attn1.*`, or `re:` and an expression.
        lora: Train pairs of matrices beside the linear and convolution layers instead of their
            weights. They start as nothing: the denoiser's output does not change. Norms, single
            parameters and grouped convolutions have none.
        seed: Draws the first matrices of a LoRA.

    Raises:
        ConfigError: The denoiser has no such parameters or layers, they are quantised, or it has
            LoRAs already.
    """
    chosen = _names_of(denoiser, family, trains)
    if lora is not None:
        _add_lora(denoiser, _layers_of(denoiser, chosen, trains), lora, seed=seed)
        chosen = [name for name, _ in denoiser.named_parameters() if ".lora_" in name]
    is_chosen = set(chosen)
    for name, parameter in denoiser.named_parameters():
        if name in is_chosen:
            _to_fp32(parameter, name=name)
        parameter.requires_grad_(name in is_chosen and parameter.is_floating_point())
    found = {name: one for name, one in denoiser.named_parameters() if name in is_chosen}
    return Trained(
        parameters=tuple(found.values()),
        names=tuple(found),
        counts=count_parameters({name: one.numel() for name, one in found.items()}),
    )


def trained_state(denoiser: nn.Module, trained: Trained) -> dict[str, torch.Tensor]:
    """Return what training made, on the CPU, in fp32, as files have it.

    Whole tensors have the denoiser's own names. A LoRA's are those of PEFT and diffusers; alpha /
    rank is multiplied into them, so that no reader has to know it.
    """
    state = {}
    for name, parameter in zip(trained.names, trained.parameters, strict=True):
        value = parameter.detach().to("cpu", copy=True).contiguous()
        layer, mark, _ = name.partition(".lora_B.")
        if mark:
            value *= denoiser.get_submodule(layer).scaling[_PEFT_NAME]  # type: ignore[index]
        state[name.replace(f".{_PEFT_NAME}.weight", ".weight")] = value
    return state


def trained_header(trained: Trained) -> dict[str, str]:
    """Return what stands in the header of the file with `trained_state`.

    A LoRA of one of two networks says of which: without, readers give it to all that fit.
    """
    if not any(".lora_" in name for name in trained.names):
        return {}
    modules = dict.fromkeys(name.partition(".")[0] for name in trained.names)
    return {MODULES_KEY: ",".join(modules)}


def _names_of(denoiser: nn.Module, family: Family, trains: str) -> list[str]:
    if any(isinstance(module, BaseTunerLayer) for module in denoiser.modules()):
        raise ConfigError(
            "The denoiser has LoRA layers already.",
            fix="Load the model without its LoRA, or merge the LoRA into it first.",
        )
    names = [name for name, _ in denoiser.named_parameters()]
    groups = {group_of(name) for name in names}
    chosen: list[str] = []
    for group in TRAINED_GROUPS.get(trains, (trains,)):
        fits = _selection(group)
        found = [name for name in names if fits(name)]
        if not found:
            raise ConfigError(
                f"`trains` is `{trains}`, and no parameter of this {family.name} denoiser is of "
                f"`{group}`; its groups are: {', '.join(sorted(groups))}.",
                fix="Add an adapter to the model first, or train another group."
                if group == "adapter"
                else f"Use one of these, `all`, or a pattern for names like `{names[0]}`.",
            )
        chosen += found
    return chosen


def _selection(group: str) -> Callable[[str], bool]:
    if group == "all":
        return lambda name: True
    try:
        return selects(group)
    except MotionMergeError as error:
        raise ConfigError(f"`trains`: {error.message}", fix=error.fix) from error


def _layers_of(denoiser: nn.Module, chosen: list[str], trains: str) -> list[str]:
    weights = set(chosen)
    layers = [
        name
        for name, module in denoiser.named_modules()
        if isinstance(module, _LAYERS)
        and f"{name}.weight" in weights
        and getattr(module, "groups", 1) == 1
    ]
    if not layers:
        raise ConfigError(
            f"`trains` is `{trains}`, in which there is no linear or convolution layer for a LoRA.",
            fix="Leave `lora` out, or train another group.",
        )
    return layers


def _add_lora(denoiser: nn.Module, layers: list[str], lora: LoraShape, *, seed: int) -> None:
    config = LoraConfig(
        r=lora.rank,
        # PEFT annotates a whole number and computes with any.
        lora_alpha=lora.alpha or lora.rank,  # type: ignore[arg-type]
        lora_dropout=lora.dropout,
        target_modules=layers,
    )
    with torch.random.fork_rng():
        torch.manual_seed(whole_number_for(seed, "LoRA"))
        inject_adapter_in_model(config, denoiser, adapter_name=_PEFT_NAME)


def _to_fp32(parameter: nn.Parameter, *, name: str) -> None:
    is_plain = type(parameter) is nn.Parameter and type(parameter.data) is torch.Tensor
    if not is_plain or not parameter.is_floating_point():
        raise ConfigError(
            f"`{name}` is a {type(parameter.data).__name__} of {parameter.dtype}: quantised or "
            "packed, so that it cannot be trained itself.",
            fix="Train a LoRA (`lora`), or load the model in bf16.",
        )
    parameter.data = parameter.data.float()
