"""A recipe of LoRAs as Wan2GP types it: a multiplier for each phase, and where the phases change.

Source: Wan2GP, shared/utils/loras_mutipliers.py, read and not run. A phase lasts while the timestep
is above its threshold, as `above` of a schedule does.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from motionmerge.conditions import TRAINING_STEPS
from motionmerge.errors import RecipeError
from motionmerge.merging.algebra.nodes import Checkpoint
from motionmerge.merging.inputs.resolvers import split_name
from motionmerge.merging.lora.task_vector import lora_terms
from motionmerge.merging.recipes.recipe import OWN_MODEL, Recipe
from motionmerge.schedule import ScheduleEntry

_MOST_PHASES = 3


@dataclass(frozen=True, kw_only=True)
class Wan2gpSettings:
    """What to choose and type in Wan2GP.

    Attributes:
        loras: The LoRAs by name, in this order.
        multipliers: For each LoRA its multiplier in each phase: `-0.25;1`.
        thresholds: The timesteps, of 1000, down to which the phases but the last hold.
    """

    loras: tuple[str, ...]
    multipliers: tuple[str, ...]
    thresholds: tuple[float, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return the settings by the names that Wan2GP has for them."""
        names = ("switch_threshold", "switch_threshold2")
        return {
            "activated_loras": list(self.loras),
            "loras_multipliers": " ".join(self.multipliers),
            "guidance_phases": len(self.thresholds) + 1,
            **dict(zip(names, self.thresholds, strict=False)),
        }

    def lines(self) -> list[str]:
        """Return what to do, line by line."""
        found = [
            f"Choose {', '.join(self.loras)}, in this order.",
            f"Loras Multipliers: {' '.join(self.multipliers)}",
            f"Guidance phases: {len(self.thresholds) + 1}",
        ]
        for number, threshold in enumerate(self.thresholds, start=1):
            found.append(f"Phase {number} to {number + 1} at timestep {threshold:g}")
        return found


def wan2gp_settings(recipe: Recipe) -> Wan2gpSettings:
    """Return the settings of Wan2GP that are a recipe of LoRAs.

    Args:
        recipe: Experts that add LoRAs to the model in the pipeline (`memory:base`), in a schedule
            of at most three entries with noise levels or timesteps.

    Raises:
        RecipeError: Wan2GP cannot say it.
    """
    entries = recipe.schedule.entries if recipe.schedule else ()
    if not 0 < len(entries) <= _MOST_PHASES:
        raise RecipeError(
            f"The schedule has {len(entries)} entries, and Wan2GP one to {_MOST_PHASES} phases.",
            fix="Write a schedule of one to three entries.",
        )
    if recipe.schedule:
        recipe.schedule.check_no_knobs("an export")
    weights = [_weights(recipe, entry.expert) for entry in entries]
    names = list(dict.fromkeys(name for own in weights for name in own))
    if not names:
        raise RecipeError("The recipe has no LoRAs.", fix="Add one: `base + lora(style, 1.0)`.")
    return Wan2gpSettings(
        loras=tuple(_file(recipe, name) for name in names),
        multipliers=tuple(";".join(f"{own.get(name, 0.0):g}" for own in weights) for name in names),
        thresholds=tuple(_threshold(entry) for entry in entries[:-1]),
    )


def _weights(recipe: Recipe, name: str) -> Mapping[str, float]:
    """Return the weight of each LoRA in an expert.

    Raises:
        RecipeError: The expert is more than LoRAs on the model in the pipeline.
    """
    expert: Checkpoint = recipe.experts[name]
    terms = [term for vector in expert.vectors for term in lora_terms(vector)]
    base = recipe.inputs[expert.anchor.name].path
    if base != OWN_MODEL or None in dict(terms):
        raise RecipeError(
            f"`{name}` is `{expert}`, and Wan2GP adds LoRAs to its model and does nothing else.",
            fix="Write `motionmerge export loras RECIPE --for wan2gp -o FOLDER`, which makes LoRAs "
            f"of the experts; or use experts such as `base + lora(style, 1.0)` with `base: "
            f"{OWN_MODEL}`.",
        )
    found: dict[str, float] = {}
    for lora, weight in terms:
        found[str(lora)] = found.get(str(lora), 0.0) + weight
    return found


def _threshold(entry: ScheduleEntry) -> float:
    if entry.above is not None:
        return float(round(entry.above * TRAINING_STEPS, 6))
    if entry.timestep is not None:
        return float(entry.timestep)
    raise RecipeError(
        f"The schedule entry of `{entry.expert}` has a `step_fraction`, and Wan2GP's phases change "
        "at timesteps.",
        fix="Write `above: 0.9`, the noise level down to which it denoises.",
    )


def _file(recipe: Recipe, name: str) -> str:
    path = recipe.inputs[name].path
    return name if split_name(path) else path.replace("\\", "/").rpartition("/")[2]
