"""What a study is: the manifest that raters' pages read, and the key that they must not see."""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Annotated, Final, Literal

from pydantic import Field

from motionmerge.config import FrozenModel
from motionmerge.errors import ConfigError, DataError
from motionmerge.io.json_file import load_json
from motionmerge.version import __version__

FORMAT: Final = "motionmerge study 1"
STUDY_FILE, SITE, ANSWERS_FILE = "study.json", "site", "answers.jsonl"

QUESTIONS = {
    "motion": "In which video does more move?",
    "prompt": "Which video does more of what the text asks for?",
    "quality": "Which video looks better: sharper, whole, without flicker?",
    "image": "Which video stays closer to the picture that it starts from?",
    "overall": "Which video do you like better, all in all?",
}
"""What raters are asked, in this order."""

Choice = Literal["left", "right", "tie", "cannot"]
Id = Annotated[str, Field(pattern=r"^[0-9a-f]{20}$")]
"""The first 20 digits of a SHA-256, which say nothing of the system that made a video."""

VideoName = Annotated[str, Field(pattern=r"^[0-9a-f]{20}\.mp4$")]
PhotoName = Annotated[str, Field(pattern=r"^[0-9a-f]{20}\.jpg$")]


class Task(FrozenModel):
    """Two videos that are judged beside each other.

    Attributes:
        id: Its name.
        form: The number of the form that it is on; a rater gets one form.
        first, second: The videos. A rater's page shows either as it is or all tasks swapped.
        photo: The picture that both start from.
        prompt: What was asked for.
    """

    id: Id
    form: Annotated[int, Field(ge=0)]
    first: VideoName
    second: VideoName
    photo: PhotoName | None
    prompt: str | None


class Manifest(FrozenModel):
    """What a rater's page knows.

    Attributes:
        id: Of the study: answers to another one are refused.
        questions: Their texts by name.
        num_repeats: How many tasks each rater gets twice, the second time swapped.
    """

    format: Literal["motionmerge study 1"]
    id: Id
    title: str
    questions: Annotated[dict[str, str], Field(min_length=1)]
    num_repeats: Annotated[int, Field(ge=0)]
    tasks: Annotated[tuple[Task, ...], Field(min_length=1)]

    @cached_property
    def by_id(self) -> Mapping[str, Task]:
        """The tasks by their names."""
        return {task.id: task for task in self.tasks}

    @property
    def num_forms(self) -> int:
        """How many forms there are."""
        return 1 + max(task.form for task in self.tasks)


class ComparedPair(FrozenModel):
    """What a task compares.

    Attributes:
        first, second: The systems that made the videos.
        scene: The number of their prompt, photo and seed.
    """

    kind: Literal["pair"] = "pair"
    first: str
    second: str
    scene: int


class AttentionCheck(FrozenModel):
    """A task whose videos say what to answer.

    Attributes:
        expected: The right answer to every question.
    """

    kind: Literal["check"] = "check"
    expected: Literal["left", "right"]


class ExclusionRule(FrozenModel):
    """Which raters do not count: written down before there are answers, and applied as it is.

    Attributes:
        most_failed_checks: Attention checks that may be answered wrongly.
        least_repeat_agreement: Share of the questions of repeated tasks that must be answered the
            same way, where both answers name a video, and at least five do.
        least_seconds: Of the median task.
    """

    most_failed_checks: Annotated[int, Field(ge=0)] = 0
    least_repeat_agreement: Annotated[float, Field(ge=0, le=1)] = 0.4
    least_seconds: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 2.0


class Study(FrozenModel):
    """The whole of a study, which stays with whoever runs it.

    Attributes:
        systems: In the order in which they were given.
        key: What each task is.
        rule: See `ExclusionRule`.
        seed: Of orders and sides.
    """

    manifest: Manifest
    systems: tuple[str, ...]
    key: dict[Id, Annotated[ComparedPair | AttentionCheck, Field(discriminator="kind")]]
    rule: ExclusionRule
    seed: int
    motionmerge: str = __version__

    @property
    def num_scenes(self) -> int:
        """How many prompts, with photo and seed, there are."""
        return len({one.scene for one in self.key.values() if isinstance(one, ComparedPair)})

    @property
    def compared(self) -> list[tuple[str, str]]:
        """The pairs of systems that are compared, in the systems' order."""
        asked = [one for one in self.key.values() if isinstance(one, ComparedPair)]
        pairs = {frozenset((one.first, one.second)) for one in asked}
        ordered = itertools.combinations(self.systems, 2)
        return [pair for pair in ordered if frozenset(pair) in pairs]

    def to_json(self) -> str:
        """Return what `read_study` reads."""
        return json.dumps(self.model_dump(mode="json"), indent=1, ensure_ascii=False) + "\n"


def read_study(folder: Path) -> Study:
    """Read what `build_study` wrote.

    Raises:
        DataError: There is none, or it is damaged or contradicts itself.
    """
    path = folder / STUDY_FILE
    try:
        study = Study(**load_json(path))
    except (OSError, ValueError, TypeError, RecursionError, ConfigError) as error:
        raise DataError(
            f"{path} is no study: {str(error)[:300]}",
            fix="Give the folder that `motionmerge study build` wrote.",
        ) from error
    fault = _contradiction(study)
    if fault:
        raise DataError(f"{path} {fault}.", fix="Build the study again.")
    return study


def _contradiction(study: Study) -> str | None:
    """Return what does not fit together in a file that was edited by hand."""
    manifest, systems = study.manifest, set(study.systems)
    compared = [one for one in study.key.values() if isinstance(one, ComparedPair)]
    if set(study.key) != set(manifest.by_id):
        return "has a key of other tasks"
    if len(manifest.by_id) < len(manifest.tasks):
        return "has two tasks of one name"
    if {task.form for task in manifest.tasks} != set(range(manifest.num_forms)):
        return "has a form without tasks"
    if len(systems) < len(study.systems):
        return "has two systems of one name"
    if any(one.first == one.second or not {one.first, one.second} <= systems for one in compared):
        return "compares other systems than it names"
    return None
