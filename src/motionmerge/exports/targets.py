"""For which tool an export is: names, which file is for which part of the denoising, what to type.

Wan 2.2 has two denoisers: `transformer` while it is noisy, `transformer_2` after that. Other tools
take a file for each.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from motionmerge.conditions import TRAINING_STEPS
from motionmerge.errors import CheckpointError, ConfigError
from motionmerge.exports.comfyui_limits import TRIED
from motionmerge.exports.names import (
    ModelPart,
    Style,
    diffusion_model,
    either_denoiser,
    module_in_diffusers,
)
from motionmerge.io.json_file import read_json
from motionmerge.merging.inputs.sources import Origin
from motionmerge.merging.recipes.recipe import OWN_MODEL, InputValue, Recipe
from motionmerge.schedule import ScheduleEntry
from motionmerge.text import fix_unknown_name

_PAIR = ("transformer", "transformer_2")
_SUFFIXES = {"transformer": "_high_noise", "transformer_2": "_low_noise"}
_SHIFTS = (5.0, 8.0)


@dataclass(frozen=True, kw_only=True)
class Target:
    """A tool that loads LoRA files.

    Attributes:
        name: What `--for` calls it.
        title: What it calls itself.
        style: The names that it knows.
        front: What it wants in front of them.
        each_denoiser: It wants a file for each denoiser.
        plain_differences: It reads `.diff` and `.diff_b`, the differences that no matrices hold.
        most_dimensions: Weights of so many dimensions it reads as two factors.
        drops: Endings of tensors that it leaves out.
    """

    name: str
    title: str
    style: Style
    front: Callable[[ModelPart], str]
    each_denoiser: bool
    plain_differences: bool
    most_dimensions: int
    drops: tuple[str, ...] = ()


DIFFUSERS = Target(
    name="diffusers",
    title="diffusers",
    style="diffusers",
    front=either_denoiser,
    each_denoiser=True,
    plain_differences=False,
    most_dimensions=5,
    drops=("cond_type_embed.weight", "fps_embedding.weight"),  # tables, whose factors it ignores
)
# ComfyUI reads factors of 5-d kernels, but diffusers, which reads the other keys, refuses the file.
COMFYUI = Target(
    name="comfyui",
    title="ComfyUI",
    style="comfyui",
    front=diffusion_model,
    each_denoiser=True,
    plain_differences=True,
    most_dimensions=4,
)
ORIGINAL = replace(COMFYUI, name="original", most_dimensions=5)
"""The original code's names with the contents of a file for motionmerge."""
# Wan2GP multiplies factors of linear layers only, and drops the changes of modulations.
WAN2GP = Target(
    name="wan2gp",
    title="Wan2GP",
    style="original",
    front=diffusion_model,
    each_denoiser=True,
    plain_differences=True,
    most_dimensions=2,
    drops=("modulation",),
)
MOTIONMERGE = Target(
    name="motionmerge",
    title="motionmerge",
    style="diffusers",
    front=module_in_diffusers,
    each_denoiser=False,
    plain_differences=True,
    most_dimensions=5,
)

TARGETS: Mapping[str, Target] = {
    target.name: target for target in (COMFYUI, DIFFUSERS, WAN2GP, MOTIONMERGE)
}


def parse_target(name: str) -> Target:
    """Return the target of a name.

    Raises:
        ConfigError: There is none.
    """
    if name not in TARGETS:
        raise ConfigError(
            f"`{name}` is no tool that LoRAs are written for.", fix=fix_unknown_name(name, TARGETS)
        )
    return TARGETS[name]


@dataclass(frozen=True)
class ExportFile:
    """One file of an export.

    Attributes:
        expert: Whose weights it holds.
        modules: Which modules' they are; empty names for a model that is one denoiser.
        stem: Its name without ending.
    """

    expert: str
    modules: tuple[str, ...]
    stem: str


@dataclass(frozen=True)
class Phase:
    """A part of the denoising, in which one file is in force.

    Attributes:
        file: The file.
        above: The noise level at which the next phase begins; None in the last, and where it is
            not known.
    """

    file: ExportFile
    above: float | None = None


@dataclass(frozen=True)
class ExportPlan:
    """The files of an export, and when each is in force.

    Attributes:
        files: All of them.
        phases: From noisy to clean; empty where the recipe does not tell.
    """

    files: tuple[ExportFile, ...]
    phases: tuple[Phase, ...]

    def multipliers(self, file: ExportFile) -> str | None:
        """Return what Wan2GP calls the multiplier of a file, one number for each phase."""
        if file not in [phase.file for phase in self.phases]:
            return None
        return ";".join("1" if phase.file == file else "0" for phase in self.phases)


def plan_files(recipe: Recipe, parts: Sequence[ModelPart], base: Origin) -> ExportPlan:
    """List the files for tools that want one for each denoiser.

    Of a pair, an expert gets only files for the denoisers that run while it is in force, if the
    pipeline says where they change (`boundary_ratio`).

    Args:
        recipe: The recipe.
        parts: The modules of the model.
        base: Where the model is.
    """
    modules = [part.module for part in parts if part.is_denoiser]
    entries = _entries_of(recipe)
    phases: list[Phase] = []
    if len(modules) == 1:  # what is no denoiser goes with it
        modules = [part.module for part in parts]
        phases = [Phase(_file(entry.expert, modules), _level(entry)) for entry in entries]
    elif modules == list(_PAIR):
        phases = _phases_of_pair(entries, _boundary_ratio(base))
    held = [phase.file for phase in phases]
    for expert in recipe.experts:
        if expert not in [file.expert for file in held]:
            pair = modules == list(_PAIR)
            each = [[module] for module in modules] if pair else [modules]
            held += [_file(expert, own, suffixed=pair) for own in each]
    return ExportPlan(tuple(dict.fromkeys(held)), tuple(phases))


def plan_whole_files(recipe: Recipe, parts: Sequence[ModelPart], base: Origin) -> ExportPlan:
    """List the files where each holds all modules of an expert."""
    modules = [part.module for part in parts]
    files = {expert: _file(expert, modules) for expert in recipe.experts}
    entries = _entries_of(recipe)
    phases = tuple(Phase(files[entry.expert], _level(entry)) for entry in entries)
    return ExportPlan(tuple(files.values()), phases)


def _entries_of(recipe: Recipe) -> Sequence[ScheduleEntry]:
    """Return the entries of a recipe's schedule.

    Raises:
        RecipeError: One of them sets more than an expert, which files of weights do not.
    """
    if recipe.schedule is None:
        return ()
    recipe.schedule.check_no_knobs("an export")
    return recipe.schedule.entries


def how_to_load(target: Target, plan: ExportPlan, folder: Path, family: str | None) -> list[str]:
    """Return lines that say which tools load the files, and what to type there."""
    if target is ORIGINAL and family == "dynamicrafter":
        return ["motionmerge loads it, and what knows DynamiCrafter's official names."]
    if target in (COMFYUI, ORIGINAL):
        return _in_comfyui(plan, family)
    if target is WAN2GP:
        return _in_wan2gp(plan, family)
    if target is DIFFUSERS:
        return _in_diffusers(plan, folder, family)
    return [
        "motionmerge loads it: `lora(FILE, 1.0)` in a recipe, which may change any layer; "
        "`--lora FILE=1.0` if it changes only layers that PEFT knows. Other tools take a file for "
        "each denoiser: --for comfyui, diffusers or wan2gp."
    ]


def how_to_load_files(plan: ExportPlan, family: str | None, limits: Sequence[str]) -> list[str]:
    """Return lines that say which tools load single files with original names, and how.

    Args:
        plan: The files.
        family: Their family; None if it is unknown.
        limits: What ComfyUI does not make of them, see `comfyui_limits`.
    """
    if family == "dynamicrafter":
        return ["The official code of DynamiCrafter loads it, and `motionmerge convert`."]
    if limits:
        return [*limits]
    if family not in TRIED:
        return [f"The names are those of the original {family}; ComfyUI was not tried with it."]
    files = [phase.file for phase in plan.phases] or plan.files
    high, low = ([file.stem for file in files if file.modules[0] == module] for module in _PAIR)
    if low:
        either = f"{' or '.join(high)} where it is noisy, {' or '.join(low)} after that"
        load, finetune = (
            f"two nodes Load Diffusion Model: {either}",
            (f"`URLs` names {' or '.join(high)}, `URLs2` {' or '.join(low)}"),
        )
    else:
        load, finetune = "node Load Diffusion Model", "`URLs` names the file"
    lines = [f"ComfyUI loads it: put it into models/diffusion_models, {load}."]
    if family in _WAN2GP_FOLDERS:
        lines.append(f"Wan2GP: a finetune whose {finetune}.")
    return lines


def _file(expert: str, modules: Sequence[str], *, suffixed: bool = False) -> ExportFile:
    suffix = _SUFFIXES[modules[0]] if suffixed else ""
    return ExportFile(expert, tuple(modules), expert + suffix)


def _phases_of_pair(entries: Sequence[ScheduleEntry], boundary: float | None) -> list[Phase]:
    """Cut the phases of the experts where the denoisers change."""
    high, low = _PAIR
    if len(entries) == 1:
        expert = entries[0].expert
        return [
            Phase(_file(expert, [high], suffixed=True), boundary),
            Phase(_file(expert, [low], suffixed=True)),
        ]
    levels = [_level(entry) for entry in entries[:-1]]
    known = [level for level in levels if level is not None]
    if boundary is None or len(known) < len(levels):
        return []
    phases, upper = [], 1.0
    for entry, lower in zip(entries, [*known, 0.0], strict=True):
        if upper > boundary:
            end = max(lower, boundary)
            phases.append(Phase(_file(entry.expert, [high], suffixed=True), end))
        if lower < boundary:
            phases.append(Phase(_file(entry.expert, [low], suffixed=True), lower or None))
        upper = lower
    return phases


def _level(entry: ScheduleEntry) -> float | None:
    """Return the noise level down to which an entry holds, of a flow model."""
    if entry.timestep is not None:
        return entry.timestep / TRAINING_STEPS
    return entry.above


def _boundary_ratio(base: Origin) -> float | None:
    """Return where a pipeline folder says that its denoisers change."""
    if not isinstance(base, Path):
        return None
    try:
        ratio = read_json(base / "model_index.json").get("boundary_ratio")
    except CheckpointError:
        return None
    return float(ratio) if isinstance(ratio, (int, float)) and 0 < ratio < 1 else None


def _in_comfyui(plan: ExportPlan, family: str | None) -> list[str]:
    lines = ["ComfyUI loads it: put it into models/loras."]
    if family not in TRIED:
        lines[0] += f" (Not tried with ComfyUI's {family}; the names are those of its original.)"
    firsts = [phase.file.modules[0] for phase in plan.phases]
    is_pair = _PAIR[1] in firsts  # a model with one denoiser may call it `transformer` too
    models = dict(zip(_PAIR, ("the high-noise model", "the low-noise model"), strict=True))
    for phase, first_module in zip(plan.phases, firsts, strict=True):
        where = models[first_module] if is_pair else "the model"
        lines.append(f"  {phase.file.stem}: LoraLoaderModelOnly on {where}, strength_model 1.00")
    for first, second in zip(plan.phases, plan.phases[1:], strict=False):
        if first.above is not None:
            shares = " and ".join(
                f"{_step_share(first.above, shift):.2f} x steps at shift {shift:g}"
                for shift in _SHIFTS
            )
            lines.append(
                f"  KSamplerAdvanced: end_at_step of {first.file.stem} and start_at_step of "
                f"{second.file.stem} where the noise level falls to {first.above:g}: {shares}."
            )
    return lines


def _step_share(level: float, shift: float) -> float:
    """Return the share of the steps that a flow schedule takes to come down to a noise level.

    level = shift t / (1 + (shift - 1) t),   t = 1 - share
    """
    return 1 - level / (shift - level * (shift - 1))


_WAN2GP_FOLDERS = {
    "wan": "loras/wan_i2v",
    "hunyuan-video": "loras/hunyuan_i2v",
    "hunyuan-video-1.5": "loras/hunyuan/1.5",
    "ltx": "loras/ltxv",
}


def _in_wan2gp(plan: ExportPlan, family: str | None) -> list[str]:
    folder = _WAN2GP_FOLDERS.get(family or "", "the model's folder below loras/")
    lines = [f"Wan2GP loads it: put it into {folder}."]
    typed = {file.stem: plan.multipliers(file) for file in plan.files}
    if None not in typed.values():
        text = " ".join(value for value in typed.values() if value)
        lines.append(f"  Choose {', '.join(typed)}, in this order. Loras Multipliers: {text}")
    if len(plan.phases) > 1 and not any(file.modules[0] in _PAIR[1:] for file in plan.files):
        lines.append("  The phases are those of its guidance; give it as many.")
    return lines


_LOADED_BY_THE_DENOISER = ("cosmos", "hunyuan-video-1.5")
"""Families whose pipelines in diffusers have no `load_lora_weights`; their transformers load."""


def _in_diffusers(plan: ExportPlan, folder: Path, family: str | None) -> list[str]:
    lines = ["diffusers loads it:"]
    pipe = "pipe"
    for file in plan.files:
        if family in _LOADED_BY_THE_DENOISER:
            pipe = "pipe.transformer"
            lines.append(
                f'  {pipe}.load_lora_adapter("{folder}", weight_name="{file.stem}.safetensors", '
                f'adapter_name="{file.stem}")'
            )
            continue
        second = ", load_into_transformer_2=True" if file.modules[0] == _PAIR[1] else ""
        lines.append(
            f'  pipe.load_lora_weights("{folder}", weight_name="{file.stem}.safetensors", '
            f'adapter_name="{file.stem}"{second})'
        )
    experts = {
        file.expert: [f.stem for f in plan.files if f.expert == file.expert] for file in plan.files
    }
    for expert, stems in experts.items():
        names = ", ".join(f'"{stem}"' for stem in stems)
        weights = ", ".join("1.0" for _ in stems)
        when = f"  # {expert}" if len(experts) > 1 else ""
        lines.append(f"  {pipe}.set_adapters([{names}], [{weights}]){when}")
    return lines


def own_model(
    recipe: Recipe, model: Path, inputs: Mapping[str, InputValue] | None
) -> dict[str, InputValue]:
    """Return the inputs that replace the recipe's, with a model where it means a loaded one.

    Args:
        recipe: The recipe.
        model: The model that is exported.
        inputs: What else replaces its inputs.
    """
    own = {name: model for name, entry in recipe.inputs.items() if entry.path == OWN_MODEL}
    return {**own, **(inputs or {})}
