"""Find the settings of the full method that suit a model, one setting after another.

First the boundary, then the strength, the drop rate, the late expert's part, and the parameter
group; each stage starts from the best so far. On validation prompts only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from motionmerge.evaluation.pocket.conditions import BEST, Condition, method, pick_conditions
from motionmerge.evaluation.pocket.runs import ConditionResults
from motionmerge.schedule import PAPER_BOUNDARY

OBEDIENCE_SHARE = 0.8  # of the fine-tuned model's obedience, which is to be kept
INTACT_SHARE = 0.5  # of the way from the base's share of intact clips to the fine-tuned model's
SEARCHED_BOUNDARIES = (0.95, 0.91, 0.86, 0.8, 0.72, 0.64, 0.5, 0.36)
ALPHAS = (0.25, 0.67, 1.33)

Run = Callable[[Sequence[Condition]], Mapping[str, ConditionResults]]


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Settings of the full method, see `conditions.method`; `reverse` swaps the two experts."""

    boundary: float = PAPER_BOUNDARY
    alpha: float = 0.25
    drop_rate: float = 0.7
    gamma: float = 0.25
    group: str | None = None
    reverse: bool = False

    def condition(self) -> Condition:
        """Return the condition, with all settings in its name."""
        made = method(
            boundary=self.boundary,
            alpha=self.alpha,
            drop_rate=self.drop_rate,
            gamma=self.gamma,
            group=self.group,
            family=BEST,
        )
        name = (
            f"boundary {self.boundary:g}, alpha {self.alpha:g}, drop rate {self.drop_rate:g}, "
            f"gamma {self.gamma:g}, {self.group or 'all groups'}"
        )
        if self.reverse:
            return replace(made.reversed(), name=f"{name}, reversed")
        return replace(made, name=name)


@dataclass(frozen=True)
class SearchResult:
    """What a search found.

    Args:
        best: The most motion among the settings that obey enough; None if none does.
        tried: All settings with their results, in the order they were tried.
        min_obedience, min_intact: What was asked for, in [0, 1].
    """

    best: ConditionResults | None
    tried: tuple[ConditionResults, ...] = field(repr=False)
    min_obedience: float = 0.0
    min_intact: float = 0.0


def search(run: Run, *, base: str = "base", tuned: str = "tuned") -> SearchResult:
    """Look for the most motion that keeps four fifths of the fine-tuned model's obedience.

    Objects must stay at least as whole as half-way between the two models.

    Args:
        run: Evaluates conditions on validation prompts.
        base, tuned: The conditions that set the bars.
    """
    ends = run(pick_conditions([base, tuned]))
    intact = ends[base].intact + INTACT_SHARE * (ends[tuned].intact - ends[base].intact)
    search = _Search(run, OBEDIENCE_SHARE * ends[tuned].obedience, intact)
    for stage in _stages(search):
        search.attempt(stage)
    best = search.best()
    return SearchResult(
        search.tried[best] if search.rank(best)[0] else None,
        tuple(search.tried.values()),
        search.min_obedience,
        search.min_intact,
    )


@dataclass
class _Search:
    """What was tried so far, and what was asked for."""

    run: Run
    min_obedience: float
    min_intact: float
    tried: dict[Settings, ConditionResults] = field(default_factory=dict)

    def attempt(self, stage: Sequence[Settings]) -> None:
        new = [settings for settings in stage if settings not in self.tried]
        results = self.run([settings.condition() for settings in new])
        self.tried |= {settings: results[settings.condition().name] for settings in new}

    def rank(self, settings: Settings) -> tuple[bool, float]:
        found = self.tried[settings]
        enough = found.obedience >= self.min_obedience and found.intact >= self.min_intact
        # Without a setting that obeys enough, the most obedient one is the place to go on from.
        return enough, found.degree if enough else found.obedience

    def best(self) -> Settings:
        return max(self.tried, key=self.rank)


def _stages(search: _Search) -> Iterator[list[Settings]]:
    """Yield settings to try; each stage is drawn when the one before it has been tried."""
    yield [Settings(boundary=b, alpha=ALPHAS[1]) for b in SEARCHED_BOUNDARIES]
    yield [replace(search.best(), alpha=alpha) for alpha in ALPHAS]
    yield [replace(search.best(), drop_rate=rate) for rate in (0.0, 0.4, 0.9)]
    yield [replace(search.best(), gamma=gamma) for gamma in (0.0, 0.5)]
    yield [replace(search.best(), group=group) for group in ("temporal", "spatial", "residual")]
    yield [replace(search.best(), reverse=True)]
    near = search.best()
    steps = (-0.03, 0.03)  # of the boundary: less than the grid's
    yield [replace(near, boundary=round(near.boundary + step, 2)) for step in steps]
