"""Run one model with LoRAs whose weights, of either sign, change with the noise level.

No dense weight is read, made or written, so that quantised models work as well. Layers are PEFT's.
"""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from motionmerge.errors import CheckpointError, ConfigError, RecipeError, ShapeError
from motionmerge.merging.inputs.coverage import Missing
from motionmerge.merging.names.wrappers import DENOISERS
from motionmerge.models.diffusers_state import group_offload_hooks, reset_caches
from motionmerge.models.video_pipeline import Scheduler, VideoPipeline
from motionmerge.schedule import ExpertSchedule
from motionmerge.switching.bank import (
    Bank,
    check_attachable,
    check_unfused,
)
from motionmerge.switching.lora_layers import DENSE, LoraLayer, LoraSource, read_lora
from motionmerge.switching.switchable import BARE_MODULE, modules_of
from motionmerge.text import fix_unknown_name

LoraWeights = Mapping[str, Mapping[str, float]]


class LoraBank(Bank):
    """LoRAs on one model, each expert a set of signed weights for them.

        expert = base + sum of weight * LoRA

    A LoRA goes to every denoiser that has its layers: in Wan 2.2 both transformers get it, and the
    schedule decides which of them uses it. LoRAs that were loaded before keep their weights, also
    if they are fused; unfuse them before or after, not meanwhile. Leaving takes the new layers out
    again.

    Args:
        target: A pipeline with a `unet`, `transformer` or `transformer_2`, or one such module.
        loras: Files or tensors, by name.
        weights: For each expert the weight of every LoRA; one that is not named has weight 0.
        schedule: Which expert denoises when.
        scheduler: Needed for a bare module; a pipeline's own is used otherwise.
        module: Use only this denoiser of the pipeline, e.g. `transformer_2`.
        missing: What to do with layers of a LoRA that the model has not: `error`, or `keep` (warn
            and go on without them).

    Attributes:
        left_out: By LoRA, its layers that the model has not, with the reason.

    Raises:
        CheckpointError: A file is no LoRA, or has layers that the model has not or that PEFT
            cannot adapt.
        ShapeError: A matrix does not fit its layer.
        RecipeError: A weight is no number or of an unknown LoRA; an expert is unknown.
        ConfigError: There is nothing to attach to, experts are attached already, or the model's
            state hides new layers (group offload).
    """

    def __init__(
        self,
        target: VideoPipeline | nn.Module,
        loras: Mapping[str, LoraSource],
        weights: LoraWeights,
        *,
        schedule: ExpertSchedule,
        scheduler: Scheduler | None = None,
        module: str | None = None,
        missing: Missing = "error",
    ) -> None:
        super().__init__(target, weights, schedule=schedule, scheduler=scheduler)
        _check_weights(loras, weights)
        wanted = dict(modules_of(target, only=module))
        names = (*DENOISERS, BARE_MODULE)
        denoisers = {name: own for name, own in modules_of(target) if name in names}
        read = {
            lora: read_lora(source, denoisers, name=lora, only=module, missing=missing)
            for lora, source in loras.items()
        }
        self.left_out = {lora: one.left_out for lora, one in read.items() if one.left_out}
        for lora, left_out in self.left_out.items():
            warnings.warn(_listed(lora, left_out), stacklevel=2)
        parts = []
        for name, denoiser in denoisers.items():
            if name not in wanted:
                continue
            own = {lora: one.layers[name] for lora, one in read.items() if one.layers[name]}
            if own:
                check_attachable(name, denoiser)
                _check_adaptable(name, denoiser)
                parts.append(AdaptedModule(name=name, module=denoiser, loras=own, weights=weights))
        self._attach(parts, module)


@dataclass(kw_only=True)
class AdaptedModule:
    """One denoiser with LoRA layers.

    Attributes:
        name: Its name in the pipeline, e.g. `transformer`.
        module: The module itself.
        loras: The layers of each LoRA.
        weights: For each expert the weight of each LoRA.
        active: The expert whose weights are in place.
    """

    name: str
    module: nn.Module
    loras: Mapping[str, Mapping[str, LoraLayer]]
    weights: LoraWeights
    active: str | None = None
    _model: nn.Module = field(init=False)
    _replaced: dict[str, nn.Module] = field(default_factory=dict)
    _adapters_before: dict[BaseTunerLayer, list[str]] = field(default_factory=dict)
    _fused_before: dict[BaseTunerLayer, list[str]] = field(default_factory=dict)
    _disabled_before: set[BaseTunerLayer] = field(default_factory=set)
    _trainable_before: dict[nn.Parameter, bool] = field(default_factory=dict)

    def __post_init__(self) -> None:
        # What torch.compile wraps notices new layers and other scales, and is compiled again.
        self._model = getattr(self.module, "_orig_mod", self.module)

    @property
    def differs(self) -> bool:
        """Whether experts differ here."""
        return (
            len({tuple(w.get(lora, 0) for lora in self.loras) for w in self.weights.values()}) > 1
        )

    def attach(self) -> None:
        """Add the layers of every LoRA.

        Raises:
            ShapeError: A matrix does not fit its layer.
            CheckpointError: PEFT has no adapter for a layer.
        """
        before = dict(self._model.named_modules())
        self._replaced = {
            layer: before[layer]
            for layers in self.loras.values()
            for layer in layers
            if not isinstance(before[layer], BaseTunerLayer)
        }
        self._adapters_before = {
            layer: list(layer.active_adapters) for layer in _tuner_layers(self._model)
        }
        for layer in self._adapters_before:
            if layer.disable_adapters:
                if layer.merged:  # as the layer itself would, the next time it is called
                    layer.unmerge()
                self._disabled_before.add(layer)
                layer.enable_adapters(True)
            # PEFT leaves all adapters of a layer out once some are in its weight. To name none
            # as fused touches no weight, and those that are must not be added a second time.
            self._fused_before[layer], layer.merged_adapters = list(layer.merged_adapters), []
        self._trainable_before = {
            parameter: parameter.requires_grad for parameter in self._model.parameters()
        }
        for lora, layers in self.loras.items():
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "Already found a `peft_config`")
                warnings.filterwarnings("ignore", "TorchaoLoraLinear was")  # cannot be fused
                try:
                    inject_adapter_in_model(lora_config(layers), self._model, _adapter(lora))
                except ValueError as error:
                    raise CheckpointError(
                        f"PEFT cannot add the LoRA `{lora}` to `{self.name}`: {str(error)[:300]}",
                        fix=DENSE,
                    ) from error
            for name, factors in layers.items():
                self._fill(name, lora, factors)
        for layer in self._adapters_before:
            layer.set_adapter(self._others(layer))

    def activate(self, expert: str) -> None:
        """Set every LoRA's weight for an expert, and clear the module's caches.

        One of weight 0 is left out: adding zeros could still change a layout and so the last bit.

        Raises:
            CheckpointError: A layer has lost its LoRAs.
            ConfigError: The module's projections were fused.
        """
        if expert == self.active:
            return
        weights = {lora: self.weights[expert].get(lora, 0.0) for lora in self.loras}
        check_unfused(self.name, self._model)
        for name in {name: None for layers in self.loras.values() for name in layers}:
            layer = self._layer(name)
            if not isinstance(layer, BaseTunerLayer):
                raise CheckpointError(
                    f"`{self.name}.{name}` lost its LoRA while experts were attached.",
                    fix="Unload LoRAs and fuse them before attaching experts.",
                )
            used = [lora for lora, own in self.loras.items() if name in own and weights[lora] != 0]
            for lora in used:
                layer.set_scale(_adapter(lora), weights[lora])
            layer.set_adapter([*self._others(layer), *(_adapter(lora) for lora in used)])
        self._keep_trainable()
        reset_caches(self._model)
        self.active = expert

    def restore(self) -> None:
        """Take the layers out again."""
        for name, original in self._replaced.items():
            parent, _, child = name.rpartition(".")
            setattr(self._model.get_submodule(parent), child, original)
        for layer, adapters in self._adapters_before.items():
            layer.set_adapter(adapters)  # first: PEFT warns of deleting one that is in use
            for lora in self.loras:
                layer.delete_adapter(_adapter(lora))
            layer.merged_adapters = self._fused_before[layer]
            if layer in self._disabled_before:
                layer.enable_adapters(False)
        configs = getattr(self._model, "peft_config", {})
        for lora in self.loras:
            configs.pop(_adapter(lora), None)
        if hasattr(self._model, "peft_config") and not configs:
            del self._model.peft_config
        self._keep_trainable()
        reset_caches(self._model)
        self.active = None

    def _others(self, layer: BaseTunerLayer) -> list[str]:
        """List the user's own LoRAs that are in use and not in the layer's weight."""
        if layer in self._disabled_before:
            return []
        fused = self._fused_before.get(layer, [])
        return [name for name in self._adapters_before.get(layer, []) if name not in fused]

    def _keep_trainable(self) -> None:
        """Undo what PEFT did to `requires_grad`, on which the last bit of a product can depend."""
        for parameter in self._model.parameters():
            parameter.requires_grad_(self._trainable_before.get(parameter, False))

    def _layer(self, name: str) -> Any:
        """Find a layer, by now one of PEFT's."""
        return self._model.get_submodule(name)

    @torch.no_grad()
    def _fill(self, name: str, lora: str, factors: LoraLayer) -> None:
        """Copy a LoRA's matrices into a new layer."""
        layer, adapter = self._layer(name), _adapter(lora)
        down, up = layer.lora_A[adapter], layer.lora_B[adapter]
        if down.weight.element_size() == 1:  # fp8 is for storing weights, not for computing
            down.float(), up.float()
        pairs = [(down.weight, factors.down), (up.weight, factors.up)]
        if up.bias is not None:
            pairs.append(
                (up.bias, torch.zeros_like(up.bias) if factors.bias is None else factors.bias)
            )
        for own, value in pairs:
            if not fits_layer(value, own):
                raise ShapeError(
                    f"`{self.name}.{name}` of the LoRA `{lora}` has shape {list(value.shape)}; the "
                    f"model's layer needs {list(own.shape)}.",
                    fix="Use a LoRA that was trained on this model.",
                )
            own.copy_(value.reshape(own.shape))


def fits_layer(value: torch.Tensor, own: torch.Tensor) -> bool:
    """Check whether a matrix is that of a layer, or the same with its kernel flattened.

    Patch embeddings are linear layers in some code and convolutions in other.
    """
    is_flat = 2 in (value.ndim, own.ndim)
    same = value.shape[:1] == own.shape[:1] if is_flat else value.shape[:2] == own.shape[:2]
    return same and value.numel() == own.numel()


def lora_config(layers: Mapping[str, LoraLayer]) -> LoraConfig:
    """Describe a LoRA to PEFT, every layer by its exact name."""
    first = next(iter(layers.values()))
    exact = {name: f"^{re.escape(name)}" for name in layers}
    return LoraConfig(
        r=first.rank,
        lora_alpha=first.alpha,
        target_modules="|".join(re.escape(name) for name in layers),
        rank_pattern={
            exact[n]: layer.rank for n, layer in layers.items() if layer.rank != first.rank
        },
        alpha_pattern={
            exact[n]: layer.alpha for n, layer in layers.items() if layer.alpha != first.alpha
        },
        lora_bias=any(layer.bias is not None for layer in layers.values()),
        init_lora_weights=False,
    )


def _check_adaptable(name: str, module: nn.Module) -> None:
    """Refuse a module whose state would hide new layers."""
    if group_offload_hooks(module):
        raise ConfigError(
            f"`{name}` is offloaded in groups, which would leave new layers behind.",
            fix="Call enable_group_offload() inside the `with experts(...)` block.",
        )


def _listed(lora: str, left_out: Mapping[str, str]) -> str:
    """Describe the layers of a LoRA that are not used."""
    names = list(left_out)
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return f"The LoRA `{lora}` is used without {', '.join(names[:5])}{more}: not in the model."


def _check_weights(loras: Mapping[str, LoraSource], weights: LoraWeights) -> None:
    for expert, named in weights.items():
        for lora, weight in named.items():
            if lora not in loras:
                raise RecipeError(
                    f"The expert `{expert}` uses the LoRA `{lora}`, which was not given.",
                    fix=fix_unknown_name(lora, loras),
                )
            number = isinstance(weight, (int, float)) and not isinstance(weight, bool)
            if not number or not math.isfinite(weight):
                raise RecipeError(
                    f"The weight of `{lora}` in the expert `{expert}` is {weight!r}.",
                    fix="Give a finite number; negative ones take the LoRA's effect away.",
                )


def _adapter(lora: str) -> str:
    """Return PEFT's name of a LoRA, which no user's own adapter has."""
    return f"motionmerge_{re.sub(r'[^A-Za-z0-9]', lambda odd: f'_{ord(odd[0]):x}_', lora)}"


def _tuner_layers(module: nn.Module) -> list[BaseTunerLayer]:
    return [child for child in module.modules() if isinstance(child, BaseTunerLayer)]
