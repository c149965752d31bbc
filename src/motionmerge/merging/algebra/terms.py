"""What checkpoints and task vectors share: printing, and refusing sums that mean nothing."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import ClassVar, NoReturn, TypeGuard

from motionmerge.errors import RecipeError

SUM, PRODUCT, SIGN, ATOM = range(4)
"""How tightly a printed expression holds together."""

CHECKPOINT, TASK_VECTOR = "checkpoint", "task vector"
"""The two types of expressions."""


class Expression(ABC):
    """A checkpoint or a task vector, as far as printing and refusing goes.

    Attributes:
        kind: CHECKPOINT or TASK_VECTOR.
    """

    kind: ClassVar[str]

    @property
    def precedence(self) -> int:
        """One of SUM, PRODUCT, SIGN, ATOM: the outermost operator of `formula()`."""
        return ATOM

    @abstractmethod
    def formula(self) -> str:
        """Print the canonical text; a recipe parses it back to an equal expression."""

    @abstractmethod
    def vectors_inside(self) -> Iterator[Expression]:
        """Return every task vector in the expression, itself included, outermost first."""

    def __str__(self) -> str:
        return self.formula()

    def text(self, *, at_least: int) -> str:
        """Print the formula as a part of one: in brackets if it holds together less tightly."""
        return self.formula() if self.precedence >= at_least else f"({self.formula()})"

    def __radd__(self, other: object) -> NoReturn:
        raise refusal(other, "+", self)

    def __rsub__(self, other: object) -> NoReturn:
        raise refusal(other, "-", self)

    def __truediv__(self, other: object) -> NoReturn:
        raise refusal(self, "/", other)

    def __rtruediv__(self, other: object) -> NoReturn:
        raise refusal(other, "/", self)


def is_number(value: object) -> TypeGuard[float]:
    """Return whether a value can scale a task vector."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def quote(text: str) -> str:
    """Write a string as a double-quoted literal."""
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'


def describe(operand: object) -> str:
    """Describe an operand, for an error."""
    if is_number(operand):
        return f"the number {operand!r}"
    if isinstance(operand, Expression):
        return f"the {operand.kind} `{operand}`"
    return f"a {type(operand).__name__}"


def negation_refusal(operand: Expression) -> RecipeError:
    """Make the error of a minus before what cannot be negated."""
    return RecipeError(
        _sentence(f"{describe(operand)} cannot be negated"), fix=_fix("-", None, operand)
    )


def refusal(left: object, operator: str, right: object) -> RecipeError:
    """Make the error of an operation that means nothing."""
    message = f"`{operator}` is not defined between {describe(left)} and {describe(right)}"
    return RecipeError(_sentence(message), fix=_fix(operator, left, right))


def _sentence(message: str) -> str:
    return message[0].upper() + message[1:] + "."


def _fix(operator: str, left: object, right: object) -> str:
    kinds = tuple(
        operand.kind if isinstance(operand, Expression) else "" for operand in (left, right)
    )
    if operator == "+" and kinds == (CHECKPOINT, CHECKPOINT):
        return "Add a task vector, e.g. `base + 0.5 * (tuned - base)`."
    if operator == "+" and kinds == (TASK_VECTOR, CHECKPOINT):
        return "Write the checkpoint first: `base + 0.5 * (tuned - base)`."
    if operator == "/":
        return "Multiply instead, e.g. `0.25 * (tuned - base)`."
    if CHECKPOINT in kinds:
        return "Only a task vector can be scaled or subtracted: `base - 0.5 * (tuned - base)`."
    return "Scale a task vector by a number and add it to a checkpoint or a task vector."
