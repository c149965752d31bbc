"""Look for the numbers of a recipe that suit a model: Optuna proposes, successive halving decides.

Every candidate is measured on few clips with few steps; these values alone are what Optuna learns
from, so that all are alike. The best third is measured more thoroughly, and the best of these on
everything; the front is drawn from that last rung. A kill loses one candidate's clips at most: the
proposals are kept in Optuna's journal, and the measurements by the hashes of what decides them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from motionmerge.errors import ConfigError, DataError
from motionmerge.evaluation.row_files import append_rows, config_hash
from motionmerge.evaluation.statistics import LEVEL, Estimate, holm
from motionmerge.evaluation.sweeps.halving import (
    Qualities,
    Rung,
    num_kept,
    ranked,
    rungs_of,
    trials_without_news,
)
from motionmerge.evaluation.sweeps.observed import Bench, Goal, Observed
from motionmerge.evaluation.sweeps.results import front_of
from motionmerge.evaluation.sweeps.space import Range, candidate, own_values
from motionmerge.io.atomic import check_file, prepare_folder
from motionmerge.merging.recipes.recipe import Recipe
from motionmerge.sampling.batch.variants import Variant
from motionmerge.text import fix_unknown_name

if TYPE_CHECKING:
    from optuna import Study
    from optuna.trial import FrozenTrial, Trial

JOURNAL = "trials.journal"
PATIENCE = 12
"""Candidates in a row that may leave the front where it is."""

_NUM_RANDOM = 8
_MOST_FAILURES = 3
_MOST_RUNS = 3
"""In how many runs a candidate may fail before it is left alone: disks fill, workers are killed."""

Tell = Callable[[str], None]
"""Told what was done, in words."""


@dataclass(frozen=True, kw_only=True)
class Proposal:
    """A recipe that was tried.

    Attributes:
        number: Of the trial; None for the recipe as it was given.
        values: The numbers searched.
        variant: Its weights.
        recipe: The same as a recipe.
    """

    number: int | None
    values: Mapping[str, float]
    variant: Variant
    recipe: Recipe


@dataclass(kw_only=True)
class Tried:
    """A candidate with what was measured, on the highest rung that it reached."""

    candidate: Proposal
    rung: Rung
    observed: Observed
    is_on_front: bool = False
    gains: dict[str, Estimate] = field(default_factory=dict)
    """Per objective, paired: how much more than the recipe as it was given."""
    chance: float = 1.0
    """How often chance makes as large a gain in the first objective in one of the candidates."""


@dataclass(frozen=True, kw_only=True)
class Tuning:
    """What a search found.

    Attributes:
        tried: All candidates, best first.
        reference: The recipe as it was given, on all clips.
        chosen: Which one to take; the reference if none is better.
        why: In a sentence.
        objectives: By name.
        rungs: From few clips to all.
        num_failed: Candidates that could not be measured.
        stopped_early: The front had not moved for `PATIENCE` candidates.
    """

    tried: Sequence[Tried]
    reference: Tried
    chosen: Tried
    why: str
    objectives: Mapping[str, Goal]
    rungs: Sequence[Rung]
    num_failed: int
    stopped_early: bool

    @property
    def front(self) -> list[Tried]:
        """What no other beats, on all clips; the most of the first objective first."""
        metric = next(iter(self.objectives.values())).metric
        on_front = [one for one in self.tried if one.is_on_front]
        return sorted(on_front, key=lambda one: -_value(one.observed, metric))


def pick_objectives(bench: Bench, text: str) -> dict[str, Goal]:
    """Read objectives with commas between them.

    Raises:
        ConfigError: One is not measured here, or there is none.
    """
    names = [name.strip() for name in text.split(",") if name.strip()]
    for name in names:
        if name not in bench.objectives:
            raise ConfigError(
                f"There is no objective `{name[:60]}` here.",
                fix=fix_unknown_name(name, bench.objectives),
            )
    if not names:
        raise ConfigError("No objective is given.", fix="Write e.g. motion,first_frame.")
    return {name: bench.objectives[name] for name in dict.fromkeys(names)}


class Tuner:
    """A search; `run` goes on where an earlier one in the folder was stopped.

    Args:
        bench: What candidates are measured on.
        recipe: Whose numbers are searched.
        space: Between which values.
        build: Finds the weights of a recipe.
        objectives: To have much of, the most important first.
        folder: Where the journal is.
        seed: Of the proposals.
        tell: Told of every candidate.
    """

    def __init__(
        self,
        bench: Bench,
        recipe: Recipe,
        space: Sequence[Range],
        *,
        build: Callable[[str, Recipe], Variant],
        objectives: Mapping[str, Goal],
        folder: Path,
        seed: int = 0,
        tell: Tell | None = None,
    ) -> None:
        self._bench, self._recipe, self._space = bench, recipe, list(space)
        self._build, self._objectives, self._folder = build, dict(objectives), folder
        self._seed, self._tell = seed, tell or (lambda _: None)
        self.rungs = rungs_of(bench.num_clips, bench.num_steps)
        self._reference = Proposal(
            number=None, values={}, variant=build("as it was", recipe), recipe=recipe
        )
        self._own = own_values(recipe, self._space)

    def seconds(self, num_trials: int) -> float | None:
        """Estimate the time of a whole search without anything kept; None if nothing was timed."""
        total, num = 0.0, num_trials
        for rung in self.rungs:
            own = self._bench.seconds(num_clips=rung.num_clips, num_steps=rung.num_steps)
            if own is None:
                return None
            total += own * (num + 1)
            num = self._num_kept(num)
        return total

    def run(self, num_trials: int) -> Tuning:
        """Propose and measure candidates until there are enough or the front rests.

        Raises:
            ConfigError: Optuna is not installed.
            DataError: The recipe as given cannot be measured, or candidates fail in a row.
        """
        prepare_folder(self._folder)
        reference = self._measured(self._reference, self.rungs[0])
        study = self._study()
        tried, num_failed, stopped_early = self._explore(study, num_trials)
        for before, rung in zip(self.rungs, self.rungs[1:], strict=False):
            equals = [one for one in tried if one.rung == before]
            best = ranked([self._qualities(one.observed) for one in equals])
            climbing = [equals[number] for number in best[: self._num_kept(len(best))]]
            rest = [one for one in tried if one not in climbing]
            reference = self._measured(self._reference, rung)
            tried = [self._measured(one.candidate, rung) for one in climbing] + rest
        return self._judged(tried, reference, num_failed, stopped_early)

    def _explore(self, study: Study, num_trials: int) -> tuple[list[Tried], int, bool]:
        """Measure candidates on the lowest rung."""
        from optuna.trial import TrialState

        tried: list[Tried] = []
        num_failed, in_a_row = 0, 0
        begun = [one for one in study.get_trials() if one.state != TrialState.WAITING]
        waiting = begun[:num_trials]
        while len(tried) + num_failed < num_trials:
            qualities = [self._qualities(one.observed) for one in tried]
            if trials_without_news(qualities) >= PATIENCE:
                return tried, num_failed, True
            known = waiting.pop(0) if waiting else None
            number, values = self._proposed(study, known)
            is_over = known is not None and known.state in (TrialState.FAIL, TrialState.COMPLETE)
            if values is None or (known is not None and known.state == TrialState.FAIL):
                num_failed += 1
                if not is_over:  # a kill came before its numbers were drawn
                    study.tell(number, state=TrialState.FAIL)
                continue
            try:
                recipe = candidate(self._recipe, values)
                variant = self._build(_name(values), recipe)
                one = self._measured(
                    Proposal(number=number, values=values, variant=variant, recipe=recipe),
                    self.rungs[0],
                )
            except DataError as error:
                num_failed, in_a_row = num_failed + 1, in_a_row + 1
                self._tell(f"{_name(values)}: {error.message}")
                if not is_over:
                    _count_failure(study, number)
                if in_a_row >= _MOST_FAILURES:
                    raise
                continue
            in_a_row = 0
            if not is_over:
                study.tell(number, list(self._qualities(one.observed)))
            tried.append(one)
        return tried, num_failed, False

    def _proposed(
        self, study: Study, known: FrozenTrial | None
    ) -> tuple[int, dict[str, float] | None]:
        """Return a trial's number and values; None where a kill came before they were drawn."""
        if known is not None:
            if {one.name for one in self._space} > set(known.params):
                return known.number, None
            return known.number, {
                one.name: _drawn(one, known.params[one.name]) for one in self._space
            }
        # A sampler of its own for each trial: what is proposed does not depend on kills before.
        study.sampler = _sampler(self._seed, len(study.get_trials(deepcopy=False)))
        trial = study.ask()
        return trial.number, {one.name: _drawn(one, _suggest(trial, one)) for one in self._space}

    def _measured(self, one: Proposal, rung: Rung) -> Tried:
        observed = self._bench.observe(
            one.variant, num_clips=rung.num_clips, num_steps=rung.num_steps
        )
        for name, objective in self._objectives.items():
            if observed.mean(objective.metric) is None:
                raise DataError(
                    f"Of `{one.variant.name}` no clip has `{objective.metric}`.",
                    fix=f"Leave the objective {name} out, or give prompts that it is about, such "
                    "as `the camera pans left`, and photos.",
                )
        found = Tried(candidate=one, rung=rung, observed=observed)
        if one.values == self._own:  # what was told of the recipe as it was
            return found
        texts = [
            f"{name} {_mean(observed, goal.metric).text(goal.digits)} {goal.unit}".rstrip()
            for name, goal in self._objectives.items()
        ]
        self._tell(
            f"{one.variant.name}: {', '.join(texts)} ({rung.num_clips} clips, "
            f"{rung.num_steps} steps)"
        )
        return found

    def _judged(
        self, tried: list[Tried], reference: Tried, num_failed: int, stopped_early: bool
    ) -> Tuning:
        top = [one for one in tried if one.rung == self.rungs[-1]]
        for one, is_on_front in zip(
            top, front_of([self._qualities(one.observed) for one in top]), strict=True
        ):
            one.is_on_front = is_on_front
            for name, objective in self._objectives.items():
                gain = one.observed.difference(reference.observed, objective.metric)
                if gain is not None:
                    one.gains[name] = gain
        self._add_chances(top, reference, num_tried=len(tried))
        chosen, why = choose(
            [one for one in top if one.is_on_front],
            reference,
            self._objectives,
            num_tried=len(tried),
        )
        return Tuning(
            tried=tried,
            reference=reference,
            chosen=chosen,
            why=why,
            objectives=self._objectives,
            rungs=self.rungs,
            num_failed=num_failed,
            stopped_early=stopped_early,
        )

    def _add_chances(self, top: Sequence[Tried], reference: Tried, *, num_tried: int) -> None:
        """Correct for how many candidates were tried on the same clips (Holm)."""
        metric = next(iter(self._objectives.values())).metric
        own = [one.observed.p_value(reference.observed, metric, num_tests=num_tried) for one in top]
        others = [1.0] * (num_tried - len(top))
        corrected = holm({str(number): p for number, p in enumerate([*own, *others])})
        for number, one in enumerate(top):
            one.chance = corrected[str(number)]

    def _num_kept(self, num: int) -> int:
        return num_kept(num, num_objectives=len(self._objectives))

    def _qualities(self, observed: Observed) -> Qualities:
        return tuple(_value(observed, one.metric) for one in self._objectives.values())

    def _study(self) -> Study:
        optuna = _optuna()
        lowest = self.rungs[0]
        name = config_hash(
            space=[vars(one) for one in self._space],
            objectives=list(self._objectives),
            seed=self._seed,
            rung=vars(lowest),
            bench=self._bench.key(
                self._reference.variant, num_clips=lowest.num_clips, num_steps=lowest.num_steps
            ),
        )
        path = self._folder / JOURNAL
        check_file(path)
        if path.exists():
            append_rows(path, [])  # a line that a kill cut off goes
        try:
            backend = optuna.storages.journal.JournalFileBackend(str(path))
            study = optuna.create_study(
                storage=optuna.storages.JournalStorage(backend),
                study_name=name,
                directions=["maximize"] * len(self._objectives),
                load_if_exists=True,
            )
        except (ValueError, TypeError, LookupError, AttributeError, AssertionError) as error:
            raise DataError(
                f"{path} is no journal of Optuna's: {error}",
                fix="Remove it; what was measured is kept elsewhere.",
            ) from error
        if self._own is not None and not study.get_trials(deepcopy=False):
            study.enqueue_trial(
                {one.name: _stored(one, self._own[one.name]) for one in self._space}
            )
        return study


def choose(
    front: Sequence[Tried],
    reference: Tried,
    objectives: Mapping[str, Goal],
    *,
    num_tried: int,
) -> tuple[Tried, str]:
    """Choose what gains most in the first objective and surely loses in none; say why."""
    first, *others = objectives
    safe = [
        one
        for one in front
        if all(not _is_below(one.gains.get(name)) for name in others) and first in one.gains
    ]
    best = max(safe, key=lambda one: one.gains[first].value, default=None)
    if best is None or best.gains[first].value <= 0:
        losing = f" without a sure loss of {' or '.join(others)}" if others else ""
        return reference, f"the recipe as it was: no other has more {first}{losing}"
    gains = []
    for name in (first, *others):
        unit = f" {objectives[name].unit}" if objectives[name].unit else ""
        gains.append(f"{name} {best.gains[name].text(objectives[name].digits, sign=True)}{unit}")
    if best.chance >= LEVEL:
        gains[0] += ", which may be chance"
    return best, (
        f"{'; '.join(gains)} against the recipe as it was (the best of {num_tried} candidates on "
        f"these {best.rung.num_clips} clips: expect less on others)"
    )


def _is_below(gain: Estimate | None) -> bool:
    return gain is None or gain.high < 0


def _optuna() -> Any:
    try:
        import optuna
    except ModuleNotFoundError as error:
        raise ConfigError(
            "This needs optuna, which is not installed.",
            fix="Run `pip install 'motionmerge[tune]'`.",
        ) from error
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna


def _sampler(seed: int, number: int) -> Any:
    mixed = hashlib.sha256(f"{seed}/{number}".encode()).digest()
    return _optuna().samplers.TPESampler(
        seed=int.from_bytes(mixed[:4], "big"), n_startup_trials=_NUM_RANDOM
    )


def _count_failure(study: Study, number: int) -> None:
    """Note that a candidate failed in this run; one that is left running is tried again."""
    from optuna.trial import TrialState

    name = f"failures of {number}"
    failures = study.user_attrs.get(name, 0) + 1
    study.set_user_attr(name, failures)
    if failures >= _MOST_RUNS:
        study.tell(number, state=TrialState.FAIL)


def _suggest(trial: Trial, one: Range) -> float:
    if one.values is not None:
        return trial.suggest_int(one.name, 0, len(one.values) - 1)
    return trial.suggest_float(one.name, one.low, one.high)


def _drawn(one: Range, stored: float) -> float:
    """Return the value that Optuna means: of a list it knows the places."""
    return one.rounded(stored) if one.values is None else one.values[int(stored)]


def _stored(one: Range, value: float) -> float:
    if one.values is None:
        return value
    return min(range(len(one.values)), key=lambda place: abs(one.values[place] - value))  # type: ignore[index]


def _name(values: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {value:g}" for name, value in values.items())


def _mean(observed: Observed, metric: str) -> Estimate:
    mean = observed.mean(metric)
    assert mean is not None  # checked when it was measured
    return mean


def _value(observed: Observed, metric: str) -> float:
    own = observed.values[metric]
    return sum(own.values()) / len(own)
