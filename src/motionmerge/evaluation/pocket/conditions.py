"""The conditions that the pocket model is evaluated under: which weights denoise when.

Everything is made of the shipped weights `base`, `tuned`, `naive` and `equal` by recipe: what is
measured is what a user runs. The motion knob is one family: `base - alpha (tuned - base)` is the
extrapolation of stage 2 for positive alpha, and a plain average of the two for -1 < alpha < 0.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

from motionmerge.errors import ConfigError
from motionmerge.merging.recipes.recipe import Recipe
from motionmerge.models.pocket.components import VARIANTS
from motionmerge.schedule import PAPER_BOUNDARY
from motionmerge.text import fix_unknown_name

KNOB_VALUES = (-0.5, -0.25, 0.25, 0.5, 1.0)
BOUNDARIES = (0.91, 0.8, 0.64)
BEST_RECIPE = "pocket"
"""The shipped recipe that works best on the pocket model."""

KNOB, HANDOVER, METHOD, REVERSED = "knob", "handover", "paper", "paper-reversed"
BEST, BEST_REVERSED, BEST_KNOB = "best", "best-reversed", "motion"
BEST_KNOB_VALUES = (-0.5, 0.5, 1.5, 2.0)
"""What else `generate --motion` is measured at: 1, the default, is the best recipe itself."""
_VECTOR = "(tuned - base)"


@dataclass(frozen=True, kw_only=True)
class Condition:
    """One set of weights for the whole denoising, or two with a boundary.

    Args:
        name: How it is called on the command line and in tables.
        early: Expression over the shipped weights; denoises while it is noisy.
        late: Denoises below the boundary; None uses `early` throughout.
        boundary: Noise level at which `late` takes over.
        family: Conditions that differ in one setting only.
        setting: The value of that setting.
    """

    name: str
    early: str
    late: str | None = None
    boundary: float | None = None
    family: str = ""
    setting: float = 0.0

    def recipe(self) -> Recipe:
        """Return the condition as a recipe, the way a user would write it."""
        experts = {"early": self.early} | ({} if self.late is None else {"late": self.late})
        schedule: list[dict[str, object]] = [{"expert": "early"}]
        if self.late is not None:
            schedule = [{"expert": "early", "above": self.boundary}, {"expert": "late"}]
        used = [name for name in VARIANTS if any(name in text for text in experts.values())]
        sections = {
            "inputs": {name: f"pocket:{name}" for name in used},
            "experts": experts,
            "schedule": schedule,
        }
        return Recipe.from_sections(sections)

    def at_boundary(self, boundary: float) -> Condition:
        """Return the same experts with another boundary, as a member of its family."""
        return replace(
            self,
            name=f"{self.family}-{boundary:g}",
            boundary=boundary,
            setting=boundary,
        )

    def reversed(self) -> Condition:
        """Return the two experts in the other order."""
        if self.late is None:
            raise ConfigError(f"`{self.name}` has one expert.", fix="Reverse one that has two.")
        family = f"{self.family}-reversed"
        name = f"{family}-{self.setting:g}"
        return replace(self, name=name, family=family, early=self.late, late=self.early)

    def fingerprint(self, **context: object) -> str:
        """Hash of everything that decides the result: experts, boundary and `context`."""
        content = [self.early, self.late, self.boundary, context]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def method(
    *,
    alpha: float = 0.25,
    beta: float = 0.75,
    gamma: float = 0.25,
    drop_rate: float = 0.7,
    boundary: float = PAPER_BOUNDARY,
    family: str = METHOD,
    group: str | None = None,
) -> Condition:
    """Return the full method; the defaults are the paper's.

    early = base + beta dare(-alpha (tuned - base)),   late = tuned + gamma dare(tuned - base)

    Args:
        alpha, beta, gamma, drop_rate, boundary: As in the paper, the boundary as a noise level.
        family: What to call it.
        group: Extrapolate only these parameters, see `algebra.groups`.
    """
    vector = _VECTOR if group is None else f'only{_VECTOR[:-1]}, "{group}")'
    early = f"base + {beta:g} * dare({-alpha:g} * {vector}, drop_rate={drop_rate:g}, seed=0)"
    late = "tuned"
    if gamma:
        late += f" + {gamma:g} * dare(tuned - base, drop_rate={drop_rate:g}, seed=1)"
    return Condition(
        name=f"{family}-{boundary:g}",
        early=early,
        late=late,
        boundary=boundary,
        family=family,
        setting=boundary,
    )


def knob(alpha: float) -> Condition:
    """Return one set of weights on the line through base (alpha 0) and tuned (alpha -1)."""
    sign = "-" if alpha > 0 else "+"
    return Condition(
        name=f"{KNOB}{alpha:+g}",
        early=f"base {sign} {abs(alpha):g} * {_VECTOR}",
        family=KNOB,
        setting=alpha,
    )


def handover(boundary: float) -> Condition:
    """Return base while it is noisy, tuned for the details: switching without extrapolation."""
    return Condition(
        name=f"{HANDOVER}-{boundary:g}",
        early="base",
        late="tuned",
        boundary=boundary,
        family=HANDOVER,
        setting=boundary,
    )


def paper_conditions() -> list[Condition]:
    """List all conditions that the claims need, each family from its tame to its wild end."""
    return list(_all())


def _all() -> Iterator[Condition]:
    for variant in VARIANTS:
        setting = {"base": 0.0, "tuned": -1.0}
        yield Condition(
            name=variant,
            early=variant,
            family=KNOB if variant in setting else variant,
            setting=setting.get(variant, 0.0),
        )
    yield from map(knob, KNOB_VALUES)
    yield from map(handover, BOUNDARIES)
    for boundary in BOUNDARIES:
        yield method(boundary=boundary)
        yield method(boundary=boundary).reversed()
    best = best_condition()
    for boundary in sorted({*BOUNDARIES, best.boundary or 0.0}, reverse=True):
        yield best.at_boundary(boundary)
        yield best.at_boundary(boundary).reversed()
    for motion in BEST_KNOB_VALUES:
        name = f"{BEST_KNOB}{motion:+g}"
        one = best_condition(motion=motion)
        yield replace(one, name=name, family=BEST_KNOB, setting=motion)


def best_condition(**parameters: float) -> Condition:
    """Return the shipped recipe that works best on the pocket model.

    Args:
        parameters: Other values of the recipe's, such as that of `generate --motion`.
    """
    recipe = Recipe.load(BEST_RECIPE).with_parameters(**parameters).written_out()
    entries = recipe.schedule.entries if recipe.schedule else ()
    if len(entries) != 2 or entries[0].above is None:
        raise ConfigError(
            f"The recipe {BEST_RECIPE} has no boundary as a noise level.",
            fix="Give its schedule two entries, the first with `above:`.",
        )
    early, late = (str(recipe.experts[entry.expert]) for entry in entries)
    boundary = entries[0].above
    return Condition(
        name=f"{BEST}-{boundary:g}",
        early=early,
        late=late,
        boundary=boundary,
        family=BEST,
        setting=boundary,
    )


def pick_conditions(names: Iterable[str]) -> list[Condition]:
    """Find conditions by name; a family's name stands for all of it.

    Raises:
        ConfigError: There is no such condition.
    """
    known = paper_conditions()
    chosen: dict[str, Condition] = {}
    for name in names:
        matches = [one for one in known if name in (one.name, one.family)]
        if name in VARIANTS:
            matches = [one for one in known if one.name == name]
        if not matches:
            raise ConfigError(
                f"There is no condition `{name}`.",
                fix=fix_unknown_name(name, [one.name for one in known]),
            )
        chosen |= {one.name: one for one in matches}
    return list(chosen.values())
