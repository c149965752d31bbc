"""The denoisers of a model and what other tools call their tensors.

transformer.blocks.0.attn1.to_q       diffusers
diffusion_model.blocks.0.self_attn.q  original, which the original code and ComfyUI load

A model is read under either name; tensors are renamed, cut and joined as pieces (`pieces.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Literal

from motionmerge.errors import ConfigError
from motionmerge.merge.names.hunyuan import HUNYUAN_15_STYLE
from motionmerge.merge.names.layout import to_ours, to_theirs
from motionmerge.merge.names.rules import Names
from motionmerge.merge.names.wrappers import bare_names, denoiser_alone
from motionmerge.merge.original_names import STYLES, family_of_names
from motionmerge.merge.pieces import Layout, Shapes, composed, whole

Style = Literal["diffusers", "original", "comfyui", "single_file"]
"""Names of diffusers, of a family's original code, of ComfyUI's modules where it has others than
that, or of the single files that ComfyUI recognises: these are the original ones but for
HunyuanVideo 1.5, whose q, k and v are one tensor in them."""

_UNET_STARTS = ("down_", "mid_", "up_", "conv_in", "input_blocks", "temporal_in")


@dataclass(frozen=True)
class Part:
    """A module of a model, e.g. one of its denoisers.

    Attributes:
        module: Its name in diffusers, e.g. `transformer_2`; empty where the model is one denoiser.
        names: By the names that its tensors have in it, those that they have in the model.
        shapes: By the names that its tensors have in it, their shapes.
    """

    module: str
    names: Mapping[str, str]
    shapes: Shapes

    @property
    def is_denoiser(self) -> bool:
        """It is a denoiser, which other tools load alone."""
        return self.module != "image_projector"

    @property
    def module_in_diffusers(self) -> str:
        """What a pipeline of diffusers calls it."""
        if self.module:
            return self.module
        return "unet" if any(n.startswith(_UNET_STARTS) for n in self.shapes) else "transformer"

    def of_model(self, layout: Layout) -> Layout:
        """Return a layout of its own tensors as one of the model's."""
        return composed(layout, {n: whole(self.names[n], s) for n, s in self.shapes.items()})


Naming = Callable[[Part], Layout]
"""Lists a module's tensors under other names, as pieces of those of the model."""


def parts_of_model(shapes: Shapes) -> list[Part]:
    """Take a model apart: by the modules of a pipeline folder, or what is the denoiser in a file.

    Args:
        shapes: Shape of each of its tensors.
    """
    modules: dict[str, dict[str, str]] = {}
    for name, (module, bare) in bare_names(denoiser_alone(shapes)).items():
        modules.setdefault(module, {})[bare] = name
    return [
        Part(module, names, {bare: tuple(shapes[name]) for bare, name in names.items()})
        for module, names in modules.items()
    ]


def naming(style: Style, prefix: str | None = None) -> Naming:
    """Return how tensors are called in a style; original names must be known of the family.

    Args:
        style: The style.
        prefix: What stands in front of the names; None for the module's name in diffusers.
    """

    def layout(part: Part) -> Layout:
        front = f"{part.module_in_diffusers}." if prefix is None else prefix
        named = part.of_model(renamed(part.shapes, style))
        return {front + name: tensor for name, tensor in named.items()}

    return layout


def renamed(shapes: Shapes, style: Style) -> Layout:
    """Return a denoiser's tensors under other names, as pieces of those that it has.

    Raises:
        ConfigError: No such names are known for it.
    """
    same = {name: whole(name, shape) for name, shape in shapes.items()}
    theirs = _original_style(shapes)
    ours = same if theirs is None else to_ours(shapes, theirs).layout
    if style == "diffusers":
        return ours
    family = family_of_names(shapes)
    wanted = _written(family, style)
    if wanted is None:
        families = dict.fromkeys(names.family for names in STYLES)
        raise ConfigError(
            f"No original names are known for a model with `{next(iter(shapes), '(no tensors)')}`.",
            fix=f"Use the names of diffusers; original ones are known of {', '.join(families)}.",
        )
    if theirs is not None and theirs is wanted:
        return same
    converted = to_theirs({name: tensor.shape for name, tensor in ours.items()}, wanted)
    if converted.left:
        raise ConfigError(
            f"No original name is known of {len(converted.left)} tensors of this "
            f"{wanted.family}, e.g. `{converted.left[0]}`.",
            fix="Use the names of diffusers, and report the model.",
        )
    return composed(converted.layout, ours)


_PACKED_15 = replace(
    HUNYUAN_15_STYLE,
    style="HunyuanVideo 1.5 with fused projections",
    table={
        **{
            path: ours
            for path, ours in HUNYUAN_15_STYLE.table.items()
            if not path.endswith(("_attn_q", "_attn_k", "_attn_v"))
        },
        **HUNYUAN_15_STYLE.also,
    },
    also={},
)


def _written(family: str | None, style: Style) -> Names | None:
    """Return the names of a family in a style; the first known ones are ComfyUI's spelling."""
    known = [names for names in STYLES if names.family == family]
    if style == "single_file" and family == _PACKED_15.family:
        return _PACKED_15
    if style != "comfyui":
        known = [names for names in known if "ComfyUI" not in names.style]
    return known[0] if known else None


def _original_style(shapes: Shapes) -> Names | None:
    """Return the original names that a denoiser has; None if it has those of diffusers, or ours."""
    for names in STYLES:
        if all(names.ours.find_tensor(name) for name in shapes):
            return None
    for names in STYLES:
        if all(names.is_computed(name) or names.theirs.find_tensor(name) for name in shapes):
            return names if not to_ours(shapes, names).left else None
    return None
