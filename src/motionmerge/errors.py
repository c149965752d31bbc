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
            It is shown with a capital letter and a full stop, whether it was written so or not.
    """

    def __init__(self, message: str, *, fix: str | None = None) -> None:
        self.message = message
        self.fix = None if fix is None else _sentence(fix)
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


def _sentence(text: str) -> str:
    """Return a fix with a capital letter and a full stop; a name in backticks stays as it is."""
    text = text.strip()
    return text[:1].upper() + text[1:] + ("" if text.endswith((".", "!", "?")) else ".")
