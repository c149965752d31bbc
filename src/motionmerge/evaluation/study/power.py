"""How many judgements a study needs, before anybody is asked."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy import stats

from motionmerge.errors import ConfigError
from motionmerge.evaluation.statistics import fewest_to_be_sure, sign_flip_p_values

_MOST = 1_000_000  # judgements
_FEW_RATERS = 50
"""From here on the tests of the analysis lose little against that of independent judgements."""

_SIMULATED = 500  # studies
_MOST_EACH, _MOST_SCENES = 200, 500  # in those: more of them would only find more


@dataclass(frozen=True, kw_only=True)
class StudySize:
    """How large a study has to be.

    Args:
        num_decisive: Judgements of a pair of systems that name a winner, if all were independent.
        per_pair: Judgements of each pair, with ties and with what judgements of one scene share.
        num_pairs: Pairs of systems.
        total: Judgements in all; one judgement answers every question.
        num_raters: People who judge `per_rater` pairs each: enough for `total`, and where they are
            few, so many that simulated studies find the preference over scenes and over raters.
        minutes: Of each of them, as guessed: see `SECONDS_TO_LOOK`.
    """

    num_decisive: int
    per_pair: int
    num_pairs: int
    total: int
    num_raters: int
    minutes: float


SECONDS_TO_LOOK, SECONDS_PER_QUESTION = 10, 4
"""Of a task: a guess, to tell a study of minutes from one of hours."""


def study_size(
    *,
    num_systems: int,
    num_scenes: int,
    preference: float,
    ties: float,
    power: float,
    level: float,
    num_questions: int,
    per_rater: int,
    scene_correlation: float,
) -> StudySize:
    """Compute how many judgements find a preference with a wanted power.

    An exact two-sided binomial test of judgements that name a winner, at `level` divided by the
    number of tests (pairs times questions). Judgements of the same scene resemble each other: n of
    them in S scenes count as n / (1 + (n / S - 1) rho) (design effect, Kish 1965). The analysis
    flips signs of scenes and of raters, which finds less where these are few: such studies are
    simulated, with raters who are alike.

    Args:
        num_systems: How many are compared, each with each.
        num_scenes: Prompts (with photo and seed) per system.
        preference: Share of wins among judgements with a winner that is to be found.
        ties: Share of judgements without a winner.
        power: Probability of finding it.
        level: Probability of finding any preference where there is none.
        num_questions: How many are asked.
        per_rater: Pairs that a rater judges, without checks and repeats.
        scene_correlation: rho, the intraclass correlation of a scene.

    Raises:
        ConfigError: A number is out of range, or so few scenes are never enough.
    """
    _check(locals())
    pairs = num_systems * (num_systems - 1) // 2
    corrected = level / (pairs * num_questions)
    decisive = _decisive(preference, power=power, level=corrected)
    independent = decisive / (1 - ties)
    left = 1 - independent * scene_correlation / num_scenes
    if left <= independent / _MOST:
        least = math.floor(independent * scene_correlation) + 1
        raise ConfigError(
            f"{num_scenes} scenes are too few, however many people judge them: judgements of one "
            f"scene resemble each other ({scene_correlation}).",
            fix=f"Take more than {least} scenes, e.g. {2 * least}.",
        )
    fewest = fewest_to_be_sure(pairs * num_questions, level=level)
    if num_scenes < fewest:
        raise ConfigError(
            f"{num_scenes} scenes show nothing at this level, even if all raters agree.",
            fix=f"Take {fewest} scenes or more, or ask fewer questions.",
        )
    per_pair = math.ceil(max(independent, independent * (1 - scene_correlation) / left))
    total = per_pair * pairs
    num_raters = _enough_raters(
        max(fewest, math.ceil(total / per_rater)),
        each=max(1, min(num_scenes, round(per_rater / pairs))),
        num_scenes=num_scenes,
        preference=preference,
        ties=ties,
        power=power,
        level=level,
        num_tests=pairs * num_questions,
        scene_correlation=scene_correlation,
    )
    return StudySize(
        num_decisive=decisive,
        per_pair=per_pair,
        num_pairs=pairs,
        total=total,
        num_raters=num_raters,
        minutes=per_rater * (SECONDS_TO_LOOK + SECONDS_PER_QUESTION * num_questions) / 60,
    )


def _check(given: dict[str, float]) -> None:
    ranges = {
        "num_systems": (2, 14), "num_scenes": (1, 100_000), "num_questions": (1, 26),
        "per_rater": (1, 1000),
    }  # fmt: skip
    for name, (low, high) in ranges.items():
        if not low <= given[name] <= high:
            raise ConfigError(
                f"`{name}` is {given[name]}.", fix=f"Give a number from {low} to {high}."
            )
    shares = {"preference": (0.5, 1), "power": (0.5, 1), "level": (1e-9, 0.5)}
    for name, (least, most) in shares.items():
        if not least < given[name] < most:
            raise ConfigError(
                f"`{name}` is {given[name]}.", fix=f"Give a number between {least} and {most}."
            )
    for name in ("ties", "scene_correlation"):
        if not 0 <= given[name] < 1:
            raise ConfigError(f"`{name}` is {given[name]}.", fix="Give 0 or more, and below 1.")


def _enough_raters(
    num: int,
    *,
    each: int,
    num_scenes: int,
    preference: float,
    ties: float,
    power: float,
    level: float,
    num_tests: int,
    scene_correlation: float,
) -> int:
    """Return from how many raters on, who judge `each` scenes of a pair, the analysis finds it."""
    rng, found = np.random.default_rng(0), 1.0
    each, num_scenes = min(each, _MOST_EACH), min(num_scenes, _MOST_SCENES)
    while num < _FEW_RATERS:
        scenes = np.arange(num * each) % num_scenes
        wins = np.full((_SIMULATED, num_scenes), preference)
        if scene_correlation > 0:
            spread = 1 / scene_correlation - 1
            shape = preference * spread, (1 - preference) * spread
            wins = rng.beta(*shape, size=wins.shape)
        shape = _SIMULATED, len(scenes)
        scores = np.where(rng.random(shape) < wins[:, scenes], 1.0, -1.0)
        scores[rng.random(shape) < ties] = 0
        p_values = [
            sign_flip_p_values(means, num_tests=num_tests)
            for means in (_means(scores, scenes), scores.reshape(_SIMULATED, num, each).mean(2))
        ]
        found = float((np.maximum(*p_values) <= level / num_tests).mean())
        if found >= power:
            return num
        num += max(1, num // 8)
    if found < power - 0.05:
        raise ConfigError(
            f"With {num_scenes} scenes even {num} raters find the preference in {found:.0%} of "
            "simulated studies.",
            fix=f"Take more scenes, e.g. {2 * num_scenes}, or ask fewer questions.",
        )
    return num


def _means(
    scores: npt.NDArray[np.float64], groups: npt.NDArray[np.intp]
) -> npt.NDArray[np.float64]:
    """Return the means of groups of columns, `[rows, groups]`."""
    sizes = np.bincount(groups)
    return np.stack([np.bincount(groups, weights=row) for row in scores]) / sizes


def _decisive(share: float, *, power: float, level: float) -> int:
    """Return the smallest n from which on an exact binomial test has the power.

    Power goes up and down by the steps of whole numbers, so that the next ones must have it too.
    """
    at_level, at_power = stats.norm.isf(level / 2), stats.norm.isf(1 - power)
    spread = math.sqrt(share * (1 - share))
    guess = ((at_level / 2 + at_power * spread) / (share - 0.5)) ** 2
    if not guess < _MOST:
        raise ConfigError(
            f"A preference of {share} takes more than {_MOST:,} judgements.",
            fix="Look for a larger one, e.g. `preference=0.6`.",
        )
    num, enough = max(1, math.floor(guess * 0.8)), 0
    while enough < 10:
        enough = enough + 1 if _power(num, share, level=level) >= power else 0
        num += 1
    return num - enough


def _power(num: int, share: float, *, level: float) -> float:
    critical = stats.binom.isf(level / 2, num, 0.5) + 1
    return float(stats.binom.sf(critical - 1, num, share))
