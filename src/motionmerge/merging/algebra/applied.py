"""What the functions of one task vector have in common."""

from __future__ import annotations

from dataclasses import dataclass

from motionmerge.errors import RecipeError
from motionmerge.merging.algebra.nodes import TaskVector
from motionmerge.merging.algebra.terms import describe


@dataclass(frozen=True)
class Applied(TaskVector):
    """A function of one task vector, printed like a call.

    Attributes:
        vector: What it is applied to.
    """

    vector: TaskVector


def expect_vector(value: object, function: str, *, example: str) -> TaskVector:
    """Check the argument of a function of the recipe language.

    Raises:
        RecipeError: It is no task vector.
    """
    if isinstance(value, TaskVector):
        return value
    raise RecipeError(
        f"{function}() got {describe(value)}, not a task vector.",
        fix=f"Give it a difference: `{example}`.",
    )
