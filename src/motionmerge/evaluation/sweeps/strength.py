"""How far the motion knob of a fine-tune has to be turned for the base's motion to come back.

The least value is chosen at which videos move as much as the base's, as more of it breaks sooner;
where none does, the least that moves nearly as much as the best.
Values are tried from the least on, and those above the chosen one are not tried at all.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from motionmerge.evaluation.sweeps.observed import Bench, Observed
from motionmerge.merging.recipes.recipe import Recipe
from motionmerge.sampling.batch.variants import Variant

KNOB = "motion"
ALIKE = 0.95
"""Of the most motion: what moves so much moves as much, as far as few videos can say."""

LEAST_MOTION = 0.5
"""Pixels a second in a frame 512 wide: a base that moves less has no motion to compare with."""

_MOTION, _FIDELITY = "motion_degree", "first_frame_ssim"


@dataclass(frozen=True, kw_only=True)
class ChosenStrength:
    """What was chosen.

    Attributes:
        recipe: With the value that was chosen, and what was measured in its description.
        motion: That value; None where none could be chosen, and the recipe is as it was.
        why: In a sentence.
    """

    recipe: Recipe
    motion: float | None
    why: str


def choose_strength(
    bench: Bench,
    base: Variant,
    recipe: Recipe,
    values: Sequence[float],
    *,
    build: Callable[[str, Recipe], Variant],
) -> ChosenStrength:
    """Measure the base, then the recipe at one value after another until it moves as much.

    Args:
        bench: What they are measured on.
        base: What the fine-tune began with.
        recipe: It has a parameter `motion`.
        values: Of that parameter.
        build: Finds the weights of a recipe.

    Raises:
        DataError: Not one video could be made and measured.
    """
    reference = _observe(bench, base)
    still = _motion(reference)
    if still is None or still < LEAST_MOTION:
        why = "not known" if still is None else f"{still:.2f} px/s, too little to compare with"
        return ChosenStrength(recipe=recipe, motion=None, why=f"the motion of the base is {why}")
    tried: dict[float, tuple[Recipe, Observed]] = {}
    for value in sorted(set(values)):
        changed = recipe.with_parameters(**{KNOB: value})
        tried[value] = changed, _observe(bench, build(f"{KNOB} {value:g}", changed))
        if (_share(tried[value][1], reference) or 0) >= 1:
            break
    shares = {
        value: share
        for value, (_, observed) in tried.items()
        if (share := _share(observed, reference)) is not None
    }
    if not shares:
        return ChosenStrength(recipe=recipe, motion=None, why="no motion of the fine-tune is known")
    most = max(shares.values())
    motion = min(value for value, share in shares.items() if share >= min(1, ALIKE * most))
    reason = (
        "the least that moves as much as the base"
        if most >= 1
        else "as none moves as much as the base and no smaller one nearly as much as the best"
    )
    measured = ", ".join(f"{value:g} {_text(tried[value][1], reference)}" for value in shares)
    alike = [
        f"{value:g}"
        for value in shares
        if value < motion and not _moves_less(tried[value][1], tried[motion][1])
    ]
    doubt = f"; so few videos do not tell it from {' and '.join(alike)}" if alike else ""
    why = (
        f"{KNOB} {motion:g}, {reason}{doubt}. Motion beside the base's, and SSIM of first frame "
        f"and photo (the base's {_fidelity(reference)}), at each value: {measured}; {bench.about}, "
        f"{bench.num_steps} steps"
    )
    description = f"{recipe.description} Chosen: {why}. Report numbers of other clips."
    chosen = replace(tried[motion][0], description=description)
    return ChosenStrength(recipe=chosen, motion=motion, why=why)


def _observe(bench: Bench, variant: Variant) -> Observed:
    return bench.observe(variant, num_clips=bench.num_clips, num_steps=bench.num_steps)


def _motion(observed: Observed) -> float | None:
    mean = observed.mean(_MOTION)
    return None if mean is None else mean.value


def _moves_less(observed: Observed, other: Observed) -> bool:
    """Check whether chance hardly made the difference: zero is above its 95 % interval."""
    difference = observed.difference(other, _MOTION)
    return difference is not None and difference.high < 0


def _share(observed: Observed, reference: Observed) -> float | None:
    """Return how much it moves beside the reference, over the clips that both have."""
    ours, base = observed.values[_MOTION], reference.values[_MOTION]
    both = [clip for clip in ours if clip in base]
    total = sum(base[clip] for clip in both)
    return sum(ours[clip] for clip in both) / total if total else None


def _text(observed: Observed, reference: Observed) -> str:
    share = _share(observed, reference)
    return f"{share:.0%} and {_fidelity(observed)}"


def _fidelity(observed: Observed) -> str:
    mean = observed.mean(_FIDELITY)
    return "unknown" if mean is None else f"{mean.value:.3f}"
