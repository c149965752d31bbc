"""What the functions of one task vector have in common."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TypeVar

from motionmerge.errors import RecipeError
from motionmerge.merging.algebra.nodes import TaskVector
from motionmerge.merging.algebra.terms import ATOM, describe
from motionmerge.merging.inputs.sources import Origin, Source

AppliedVector = TypeVar("AppliedVector", bound="Applied")


@dataclass(frozen=True)
class Applied(TaskVector):
    """A function of one task vector, printed like a call.

    Attributes:
        vector: What it is applied to.
    """

    vector: TaskVector

    @property
    def precedence(self) -> int:
        """ATOM."""
        return ATOM

    @property
    def children(self) -> tuple[TaskVector, ...]:
        """The vector."""
        return (self.vector,)

    def bind(self: AppliedVector, origins: Mapping[str, Origin], anchor: Source) -> AppliedVector:
        """Return the same expression with weights behind its names."""
        return replace(self, vector=self.vector.bind(origins, anchor))


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
