"""Which videos are judged beside each other: all pairs of systems, on the scenes that both have."""

from __future__ import annotations

import itertools
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from motionmerge.errors import ConfigError, DataError
from motionmerge.evaluation.report.sets import Key, pairing_key, sources_at, split_name
from motionmerge.evaluation.sources import Photos, VideoSource

_FEWEST = 2
MOST_PAIRS = 100
"""Of systems; the chart has a field for each."""


@dataclass(frozen=True)
class System:
    """A model or setting whose videos are judged.

    Args:
        name: As the results call it; raters never see it.
        by_key: Its video of each prompt, photo and seed.
    """

    name: str
    by_key: Mapping[Key, VideoSource]


@dataclass(frozen=True)
class PlannedPair:
    """Two systems on a scene; `first` and `second` already have their sides drawn."""

    first: str
    second: str
    scene: Key


def find_systems(sets: Sequence[str], photos: Photos) -> list[System]:
    """Find the videos of `NAME=PATH` or paths, folders of a batch or a sweep as they are.

    Raises:
        ConfigError: There are fewer than two, or two have one name.
        DataError: One has no video, or two of one prompt, photo and seed.
    """
    named = [split_name(text) for text in sets]
    names = [name for name, _ in named]
    if len(set(names)) < max(_FEWEST, len(names)):
        raise ConfigError(
            f"The systems are {', '.join(names) or 'none'}.",
            fix="Give two or more with names of their own: `NAME=FOLDER`.",
        )
    return [System(name, _by_key(name, sources_at(path, photos))) for name, path in named]


def _by_key(name: str, sources: Sequence[VideoSource]) -> dict[Key, VideoSource]:
    found: dict[Key, VideoSource] = {}
    for source in sources:
        other = found.setdefault(pairing_key(source), source)
        if other is not source:
            raise DataError(
                f"{name} has two videos of one prompt, photo and seed: {other.path} and "
                f"{source.path}.",
                fix="Give a folder with one of them, or keep their seeds beside them.",
            )
    return found


def plan_pairs(
    systems: Sequence[System], *, baseline: str | None, draw: random.Random
) -> list[PlannedPair]:
    """List all pairs in an order in which every stretch has all pairs of systems equally often.

    Sides alternate within a pair of systems, so that any stretch is balanced as well.

    Args:
        systems: What `find_systems` found.
        baseline: Compare all others with this one only.
        draw: Draws the order of the scenes of each pair of systems, and who begins on the left.

    Raises:
        ConfigError: There is no such baseline, or more pairs of systems than anybody can judge.
        DataError: Two systems share no scene.
    """
    names = [one.name for one in systems]
    if baseline is not None and baseline not in names:
        raise ConfigError(
            f"`baseline` is `{baseline}`, and the systems are {', '.join(names)}.",
            fix="Name one of them.",
        )
    compared = [
        pair
        for pair in itertools.combinations(systems, 2)
        if baseline is None or baseline in (pair[0].name, pair[1].name)
    ]
    if len(compared) > MOST_PAIRS:
        raise ConfigError(
            f"{len(systems)} systems make {len(compared)} pairs, more than {MOST_PAIRS}.",
            fix="Compare all with one, `baseline=`, or take fewer systems.",
        )
    columns = []
    for one, other in compared:
        shared = [key for key in one.by_key if key in other.by_key]
        if not shared:
            raise DataError(
                f"{one.name} and {other.name} share no prompt, photo and seed.",
                fix="Make their videos from the same manifest; `motionmerge measure` prints what "
                "is known of a video.",
            )
        draw.shuffle(shared)
        turned = draw.random() < 0.5
        sides = [(one.name, other.name), (other.name, one.name)]
        columns.append(
            [PlannedPair(*sides[(at + turned) % 2], key) for at, key in enumerate(shared)]
        )
    rows = itertools.zip_longest(*columns)
    return [pair for row in rows for pair in row if pair is not None]
