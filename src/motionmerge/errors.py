"""The five named errors: each says what came, what was expected, and how to fix it.

Everything the library raises on bad input is a `MotionMergeError`; the command line turns it into
one readable message and exit code 2.
"""

from __future__ import annotations


class MotionMergeError(Exception):
    """Base of all errors that a user can cause.

    Args:
        message: What came, what was expected, and where.
        fix: One imperative sentence: what the user can do about it, in the words of Python
            (`missing='keep'`); the command line names its own flag instead (`cli/faults.py`).
            Both begin with a capital letter or a name, and end with a full stop.
        place: The keys and positions that lead to the fault in a document, from the outermost on;
            whoever read it from a file adds the line (`text.at_line`).
    """

    def __init__(
        self, message: str, *, fix: str | None = None, place: tuple[int | str, ...] = ()
    ) -> None:
        self.message = message
        self.fix = fix
        self.place = place
        super().__init__(message if self.fix is None else f"{message}\n  Fix: {self.fix}")


class ConfigError(MotionMergeError):
    """A setting (flag, YAML value, argument) is unknown, missing or out of range."""


class RecipeError(MotionMergeError):
    """A recipe or an expression in it cannot be parsed, typed or carried out."""


class CheckpointError(MotionMergeError):
    """A weights file is missing, damaged, hostile, or does not hold what was asked for."""


class ShapeError(MotionMergeError):
    """A tensor has the wrong shape or dtype; both shapes are named."""


class DataError(MotionMergeError):
    """An image, a video or a dataset entry cannot be used."""
