"""Experts of a MODEL: weights on top of it, each for a part of the denoising.

A MODEL carries them as an attachment. At sampling time each expert becomes a clone of the model
that reaches the sampler: what the model had when our node ran, the expert's own patches, and then
what other nodes added after ours. ComfyUI loads these clones like any model of its own.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import comfy.lora
import torch

from .conditions import holds
from .errors import NodeError

KEY = "motionmerge"
"""What ComfyUI calls our attachment and our wrappers."""

WRAPPER = "outer_sample"
"""ComfyUI's word for what is wrapped around a whole sampling."""


@dataclass(frozen=True)
class Patch:
    """Values that are added to a model's weights: weight * keeps + values * strength.

    Attributes:
        values: What ComfyUI's `add_patches` takes, by the name of the weight.
        strength: What the values are multiplied by.
        keeps: What the weight that is there is multiplied by.
    """

    values: Mapping[Any, Any]
    strength: float
    keeps: float = 1.0


@dataclass(frozen=True, kw_only=True)
class Expert:
    """A set of weights for a part of the denoising.

    Attributes:
        name: What people see.
        conditions: When it denoises: (condition, threshold) as `conditions.holds` takes them, all
            of which must hold; none for what is left.
        model: The MODEL that it is made of.
        patches: What is done to that model's weights, in order.
        guidance: The sampler's `cfg` while it denoises; None leaves the sampler's own.
    """

    name: str
    conditions: tuple[tuple[str, float], ...] = ()
    model: Any
    patches: tuple[Patch, ...] = ()
    guidance: float | None = None

    def is_due(self, *, noise_level: float, timestep: float, step_fraction: float) -> bool:
        """Check whether all its conditions hold at a step, see `conditions.holds`."""
        return all(
            holds(
                condition,
                threshold,
                noise_level=noise_level,
                timestep=timestep,
                step_fraction=step_fraction,
            )
            for condition, threshold in self.conditions
        )


@dataclass
class Experts:
    """The experts of a MODEL, from noisy to clean, as the attachment that a MODEL carries.

    Attributes:
        experts: The first whose conditions hold denoises; the last has none.
        is_pair: They are two models with nothing done to them, so that a knob may turn both.
        patches: The patches of the MODEL when it got its experts, by weight.
        objects: What other nodes had replaced in it by then.
        uuid: ComfyUI's name of those patches.
        built: The clones of `patchers`, and what the model was like when they were made.
    """

    experts: tuple[Expert, ...]
    is_pair: bool
    patches: Mapping[str, Sequence[Any]]
    objects: Mapping[str, Any]
    uuid: Any
    built: tuple[Any, list[Any]] | None = field(default=None, repr=False)

    def on_model_patcher_clone(self) -> Experts:
        """Return what a clone of the MODEL carries: ComfyUI calls this."""
        return replace(self, built=None)

    def due(self, *, noise_level: float, timestep: float, step_fraction: float) -> int:
        """Return the index of the expert that denoises at a step."""
        moment = {"noise_level": noise_level, "timestep": timestep, "step_fraction": step_fraction}
        return next(n for n, expert in enumerate(self.experts) if expert.is_due(**moment))

    def patchers(self, arriving: Any) -> list[Any]:
        """Return a clone for each expert of the MODEL that reaches the sampler.

        They are kept while that MODEL stays as it is: ComfyUI's list of loaded models holds weak
        references, and patches every weight of a new clone again.

        Raises:
            NodeError: A node after ours took away or replaced what the MODEL had, or added what
                cannot be carried over to another model.
        """
        objects = {name: id(value) for name, value in arriving.object_patches.items()}
        state = (arriving.patches_uuid, objects, bool(arriving.hook_patches))
        if self.built is None or self.built[0] != state or arriving.hook_patches:
            self.built = (state, [self.patcher(arriving, expert) for expert in self.experts])
        return self.built[1]

    def patcher(self, arriving: Any, expert: Expert) -> Any:
        """Make one of the clones that `patchers` returns."""
        added = _added_patches(self.patches, arriving.patches)
        objects = {
            name: value
            for name, value in arriving.object_patches.items()
            if self.objects.get(name) is not value
        }
        source = expert.model
        is_same = source.is_clone(arriving)
        if not is_same and (arriving.hook_patches or arriving.injections != source.injections):
            raise NodeError(
                "Hooks and injections were added to a MODEL with two models in it; they cannot be "
                "carried over from one to the other.",
                fix="Use LoRAs without hooks, or two samplers.",
            )
        patcher = (arriving if is_same else source).clone()
        if is_same:  # `arriving` keeps its clones: a clone that keeps it would make a circle
            patcher.parent = arriving.parent
        patcher.patches = {key: list(value) for key, value in source.patches.items()}
        patcher.patches_uuid = source.patches_uuid
        patcher.object_patches = {**source.object_patches}
        bare = bare_parameters(patcher.model)
        for patch in expert.patches:
            layers = {key: value for key, value in patch.values.items() if name_of(key) not in bare}
            if layers:
                patcher.add_patches(layers, patch.strength, patch.keeps)
        for name in sorted({name_of(k) for p in expert.patches for k in p.values} & bare):
            value = _changed(source, name, expert.patches)
            patcher.add_object_patch(name, torch.nn.Parameter(value, requires_grad=False))
        if is_same and patcher.patches_uuid == self.uuid:  # the same weights: no patching again
            patcher.patches_uuid = arriving.patches_uuid
        elif added:
            patcher.add_patches({})  # names the patches anew
        for key, entries in added.items():
            patcher.patches[key] = [*patcher.patches.get(key, []), *entries]
        patcher.object_patches.update(objects)
        return patcher


def experts_of(model: Any) -> Experts | None:
    """Return the experts that a MODEL carries; None if it has none."""
    return model.get_attachment(KEY)


def with_experts(
    model: Any, experts: Iterable[Expert], *, sample: Any, is_pair: bool = False
) -> Any:
    """Return a clone of a MODEL that carries experts.

    Of a pair of models, each expert becomes two: one on top of each of the pair.

    Args:
        model: The MODEL.
        experts: From noisy to clean; the last has no conditions.
        sample: The wrapper around the sampling that switches them.
        is_pair: See `Experts`.

    Raises:
        NodeError: The MODEL has experts already.
    """
    made = tuple(experts)
    before = experts_of(model)
    if before is not None and not before.is_pair:
        names = ", ".join(expert.name for expert in before.experts)
        raise NodeError(
            f"This MODEL has experts already: {names}. Two knobs on one model would both switch.",
            fix="Remove one of the knobs, or chain Expert nodes into one Apply Experts.",
        )
    if before is not None:
        pair = [(half, before.patcher(model, half)) for half in before.experts]
        made = tuple(_on_half(expert, half, source) for expert in made for half, source in pair)
    carrier = model.clone()
    carrier.remove_wrappers_with_key(WRAPPER, KEY)
    carrier.add_wrapper_with_key(WRAPPER, KEY, sample)
    patches = {key: tuple(value) for key, value in model.patches.items()}
    objects = dict(model.object_patches)
    carrier.set_attachments(KEY, Experts(made, is_pair, patches, objects, model.patches_uuid))
    return carrier


def flattened(model: Any, half: Expert) -> list[Expert]:
    """Return a MODEL as experts of a pair: itself, or those that it carries.

    Args:
        model: The MODEL.
        half: What it is in the pair, in conditions and guidance.
    """
    held = experts_of(model)
    if held is None:
        return [half]
    built = ((expert, held.patcher(model, expert)) for expert in held.experts)
    return [_on_half(replace(expert, patches=()), half, source) for expert, source in built]


def without_experts(model: Any) -> Any:
    """Return a clone of a MODEL that carries none."""
    plain = model.clone()
    plain.remove_attachments(KEY)
    plain.remove_wrappers_with_key(WRAPPER, KEY)
    return plain


def bare_parameters(network: torch.nn.Module) -> set[str]:
    """Return the parameters to which ComfyUI does not apply patches.

    These are the parameters of modules with parameters in modules below them, as Wan's
    `modulation`: it accepts patches for them, and does nothing.
    """
    bare: set[str] = set()
    for path, module in network.named_modules():
        own = [name for name, _ in module.named_parameters(recurse=False)]
        if own and len(own) < sum(1 for _ in module.parameters()):
            bare.update(f"{path}.{name}" if path else name for name in own)
    return bare


def name_of(key: Any) -> str:
    """Return the name of the weight that a patch is for; a key may also say which rows."""
    return key if isinstance(key, str) else key[0]


def _on_half(expert: Expert, half: Expert, source: Any) -> Expert:
    """Return an expert on top of one model of a pair."""
    return replace(
        expert,
        name=f"{expert.name} of {half.name}",
        conditions=expert.conditions + half.conditions,
        model=source,
        guidance=half.guidance if expert.guidance is None else expert.guidance,
    )


def _added_patches(
    before: Mapping[str, Sequence[Any]], now: Mapping[str, Sequence[Any]]
) -> dict[str, list[Any]]:
    """Return the patches that a MODEL got since it had those of `before`."""
    added = {}
    for key in before.keys() | now.keys():
        old, new = before.get(key, ()), now.get(key, ())
        if len(new) < len(old) or any(a is not b for a, b in zip(old, new, strict=False)):
            raise NodeError(
                f"A node after ours replaced the patches of `{key}`, so that the experts no longer "
                "stand on what they were made from.",
                fix="Put that node before ours.",
            )
        if len(new) > len(old):
            added[key] = list(new[len(old) :])
    return added


def _changed(source: Any, name: str, patches: Sequence[Patch]) -> torch.Tensor:
    """Compute a parameter with patches, in its own dtype."""
    held = source.get_model_object(name)
    entries = [
        (patch.strength, value, patch.keeps, *_rows(key))
        for patch in patches
        for key, value in patch.values.items()
        if name_of(key) == name
    ]
    value = comfy.lora.calculate_weight(entries, held.to(torch.float32, copy=True), name)
    return value.to(held.dtype)


def _rows(key: Any) -> tuple[Any, Any]:
    """Return the rows that a patch is for, and what is done to it, as `add_patches` reads them."""
    parts = (None, None, None) if isinstance(key, str) else (*key, None, None)
    return parts[1], parts[2]
