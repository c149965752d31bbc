"""Answers of raters: checked against the manifest, wherever they come from, and each kept once."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from motionmerge.config import FrozenModel
from motionmerge.errors import ConfigError, DataError
from motionmerge.evaluation.row_files import read_row_file
from motionmerge.evaluation.study.manifest import ANSWERS_FILE, Choice, Id, Manifest
from motionmerge.io.paths import exists

AnswerKey = tuple[str, str, bool]
"""Rater, task, and whether it is the repeat: what is answered once."""

_FIX = f"Give {ANSWERS_FILE} of the server, or files that raters saved."


class Answer(FrozenModel):
    """What a rater said of one task; nothing in it was typed.

    Attributes:
        study: Id of the study.
        rater: A random number of the browser.
        task: Its name.
        repeat: Whether the rater sees it the second time.
        swapped: Whether the task's second video was on the left.
        choices: The answer to each question.
        seconds: From the moment it was shown.
        place: How many answers came before.
    """

    study: Id
    rater: Annotated[str, Field(pattern=r"^[0-9a-f]{32}$")]
    task: Id
    repeat: bool
    swapped: bool
    choices: dict[str, Choice]
    seconds: Annotated[float, Field(ge=0, le=86_400, allow_inf_nan=False)]
    place: Annotated[int, Field(ge=0, le=100_000)]

    @property
    def key(self) -> AnswerKey:
        """What is answered once."""
        return self.rater, self.task, self.repeat

    def winner(self, question: str) -> str:
        """Return `first`, `second`, `tie` or `cannot`, whichever side they were on."""
        choice = self.choices[question]
        if choice in ("tie", "cannot"):
            return choice
        return "first" if (choice == "left") != self.swapped else "second"


def checked_answer(value: Any, manifest: Manifest) -> Answer:
    """Return an answer that the manifest knows.

    Raises:
        DataError: It is none of this study, task or questions, or is no answer at all.
    """
    fix = "Send what this study's page writes."
    if not isinstance(value, dict):
        raise DataError("An answer is a mapping.", fix=fix)
    try:
        answer = Answer(**value)
    except (ConfigError, TypeError) as error:
        raise DataError(f"This is no answer: {str(error)[:200]}", fix=fix) from error
    if answer.study != manifest.id:
        raise DataError(
            f"This answer is of the study {answer.study}, and this is {manifest.id}.", fix=fix
        )
    if answer.task not in manifest.by_id:
        raise DataError(f"This study has no task {answer.task}.", fix=fix)
    if set(answer.choices) != set(manifest.questions):
        raise DataError(f"The questions are {', '.join(manifest.questions)}.", fix=fix)
    return answer


@dataclass(frozen=True)
class Collected:
    """The answers of some files.

    Args:
        answers: Each rater's answer to each task, the first where there are several.
        num_same: How many were there again, as exports repeat what a server has.
        num_changed: How many said something else the second time, and do not count.
    """

    answers: Sequence[Answer]
    num_same: int
    num_changed: int


def collect(answers: Iterable[Answer]) -> Collected:
    """Keep the first answer to each task."""
    kept: dict[AnswerKey, Answer] = {}
    same = changed = 0
    for answer in answers:
        other = kept.setdefault(answer.key, answer)
        if other is not answer:
            is_same = other.choices == answer.choices and other.swapped == answer.swapped
            same, changed = same + is_same, changed + (not is_same)
    return Collected(list(kept.values()), same, changed)


def read_answers(paths: Sequence[Path], manifest: Manifest) -> Collected:
    """Read files of answers, and folders that hold some (`*.jsonl`).

    Raises:
        DataError: One cannot be read, has a line that is no answer, or there is none.
    """
    for path in paths:
        if not exists(path):
            raise DataError(f"There is no file or folder {path}.", fix=_FIX)
    files = [
        file
        for path in paths
        for file in (sorted(path.glob("*.jsonl")) if path.is_dir() else [path])
    ]

    def row(value: Any) -> Answer:
        try:
            return checked_answer(value, manifest)
        except DataError as error:  # `read_row_file` names the line
            raise ValueError(error.message) from error

    fix = "Move the line to another file; without it the others count."
    found = [answer for file in files for answer in read_row_file(file, row, fix=fix)]
    if not found:
        raise DataError(f"There is no answer in {', '.join(map(str, paths))}.", fix=_FIX)
    return collect(found)
