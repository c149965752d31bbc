"""The denoisers of a model and what other tools call their tensors.

transformer.blocks.0.attn1.to_q       diffusers
diffusion_model.blocks.0.self_attn.q  original, which the original code and ComfyUI load

A model is read under either name; tensors are renamed, cut and joined as pieces (`pieces.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from motionmerge.errors import ConfigError
from motionmerge.merging.inputs.pieces import PieceLayout, Shapes, composed, whole
from motionmerge.merging.names.cogvideox import COGVIDEOX_COMFYUI_STYLE
from motionmerge.merging.names.hunyuan import HUNYUAN_15_FUSED_STYLE
from motionmerge.merging.names.layout import to_ours, to_theirs
from motionmerge.merging.names.original import STYLES, family_of_names
from motionmerge.merging.names.rules import Names
from motionmerge.merging.names.wrappers import bare_names, denoiser_alone

Style = Literal["diffusers", "original", "comfyui", "single_file"]
"""Names of diffusers, of a family's original code, of ComfyUI's modules where it has others than
that, or of the single files that ComfyUI recognises, see `_SINGLE_FILES`."""

_SINGLE_FILES = {names.family: names for names in (HUNYUAN_15_FUSED_STYLE, COGVIDEOX_COMFYUI_STYLE)}
"""Names of the single files that ComfyUI recognises, where these are not the original ones."""

_DYNAMICRAFTER_STARTS = ("down_stages.", "init_attn.")
_UNET_STARTS = ("down_", "mid_", "up_", "conv_in", "input_blocks", "temporal_in")


@dataclass(frozen=True)
class ModelPart:
    """A module of a model, e.g. one of its denoisers.

    Attributes:
        module: Its name in diffusers, e.g. `transformer_2`; empty where the model is one denoiser.
        names: Name in the whole model of each tensor, by its name inside the module.
        shapes: Shape of each tensor, by its name inside the module.
    """

    module: str
    names: Mapping[str, str]
    shapes: Shapes

    @property
    def is_denoiser(self) -> bool:
        """Whether it is a denoiser, which other tools load alone."""
        return self.module != "image_projector"

    @property
    def is_in_diffusers(self) -> bool:
        """A class of diffusers has such tensors; DynamiCrafter's are a class of ours."""
        return not any(name.startswith(_DYNAMICRAFTER_STARTS) for name in self.shapes)

    def of_model(self, layout: PieceLayout) -> PieceLayout:
        """Return a layout of its own tensors as one of the model's."""
        return composed(layout, {n: whole(self.names[n], s) for n, s in self.shapes.items()})


Naming = Callable[[ModelPart], PieceLayout]
"""Lists a module's tensors under other names, as pieces of those of the model."""


def parts_of_model(shapes: Shapes) -> list[ModelPart]:
    """Split a model into the modules of its pipeline folder; of a file, take the denoiser.

    Args:
        shapes: Shape of each of its tensors.
    """
    modules: dict[str, dict[str, str]] = {}
    for name, (module, bare) in bare_names(denoiser_alone(shapes)).items():
        modules.setdefault(module, {})[bare] = name
    return [
        ModelPart(module, names, {bare: tuple(shapes[name]) for bare, name in names.items()})
        for module, names in modules.items()
    ]


def naming(style: Style, front: Callable[[ModelPart], str]) -> Naming:
    """Return how tensors are called in a style; original names must be known of the family.

    Args:
        style: The style.
        front: What stands in front of the names of a module.
    """

    def layout(part: ModelPart) -> PieceLayout:
        named = part.of_model(renamed(part.shapes, style))
        return {front(part) + name: tensor for name, tensor in named.items()}

    return layout


def module_in_diffusers(part: ModelPart) -> str:
    """Return what a pipeline of diffusers calls a module, and a dot."""
    is_unet = any(name.startswith(_UNET_STARTS) for name in part.shapes)
    return f"{part.module or ('unet' if is_unet else 'transformer')}."


def either_denoiser(part: ModelPart) -> str:
    """Return what a LoRA of diffusers calls either of two denoisers, and a dot."""
    return module_in_diffusers(part).replace("transformer_2.", "transformer.")


def nothing(part: ModelPart) -> str:
    """Return no prefix, as in files of one denoiser."""
    return ""


def diffusion_model(part: ModelPart) -> str:
    """Return what ComfyUI calls any denoiser, and a dot."""
    return "diffusion_model."


def family_of(shapes: Shapes) -> str | None:
    """Return the family of a denoiser under either name; None if none is known."""
    theirs = _original_style(shapes)
    return family_of_names(shapes) if theirs is None else theirs.family


def family_of_parts(parts: Sequence[ModelPart]) -> str | None:
    """Return the family of a model's first denoiser; None if none is known."""
    denoiser = next((part for part in parts if part.is_denoiser), None)
    return None if denoiser is None else family_of(denoiser.shapes)


def renamed(shapes: Shapes, style: Style) -> PieceLayout:
    """Return the layout of a denoiser under the names of another style.

    Raises:
        ConfigError: No such names are known for it.
    """
    same = {name: whole(name, shape) for name, shape in shapes.items()}
    theirs = _original_style(shapes)
    ours = same if theirs is None else to_ours(shapes, theirs).layout
    if style == "diffusers":
        return ours
    family = family_of(shapes)
    known = _written(family, style)
    if not known:
        families = dict.fromkeys(names.family for names in STYLES)
        raise ConfigError(
            f"No original names are known for a model with `{next(iter(shapes), '(no tensors)')}`.",
            fix="Write LoRAs with `motionmerge export loras --for diffusers`; files of a "
            "DynamiCrafter come from `motionmerge export original`. Original names are known of "
            f"{', '.join(families)}.",
        )
    left: tuple[str, ...] = ()
    for names in known:
        if names is theirs:
            return same
        converted = to_theirs({name: tensor.shape for name, tensor in ours.items()}, names)
        if not converted.left:
            return composed(converted.layout, ours)
        left = left or converted.left
    raise ConfigError(
        f"No original name is known of {len(left)} tensors of this {family}, e.g. `{left[0]}`.",
        fix="Use the names of diffusers, and report the model.",
    )


def _written(family: str | None, style: Style) -> list[Names]:
    """Return the names of a family in a style, to be tried in turn; ComfyUI's own are the first."""
    known = [names for names in STYLES if names.family == family]
    if style == "single_file" and family in _SINGLE_FILES:
        return [_SINGLE_FILES[family]]
    if style == "comfyui":
        return known
    return [names for names in known if "ComfyUI" not in names.style]


def _original_style(shapes: Shapes) -> Names | None:
    """Return the original names that a denoiser has; None if it has those of diffusers, or ours."""
    for names in STYLES:
        if all(names.ours.find_tensor(name) for name in shapes):
            return None
    for names in STYLES:
        if all(names.is_computed(name) or names.theirs.find_tensor(name) for name in shapes):
            return names if not to_ours(shapes, names).left else None
    return None
