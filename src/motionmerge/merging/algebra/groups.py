"""Restrict task vectors to parameter groups or name patterns, and count parameters by group.

Which names belong to which group is written in `families.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from fnmatch import fnmatchcase
from typing import Any, ClassVar, TypeVar

from motionmerge.errors import ConfigError, RecipeError
from motionmerge.merging.algebra.applied import Applied, expect_vector
from motionmerge.merging.algebra.nodes import Checkpoint, TaskVector
from motionmerge.merging.algebra.steps import Lowering
from motionmerge.merging.algebra.terms import quote
from motionmerge.merging.inputs.sources import Source
from motionmerge.parameter_groups import GROUPS, OTHER, group_of
from motionmerge.patterns import compile_pattern
from motionmerge.text import fix_unknown_name

__all__ = [
    "GROUPS",
    "OTHER",
    "Only",
    "count_parameters",
    "group_of",
    "only",
    "restrict",
    "restrictions",
    "selects",
]

AnyExpression = TypeVar("AnyExpression", Checkpoint, TaskVector)

_MAX_PATTERN = 200


def count_parameters(shapes: Mapping[str, int]) -> dict[str, int]:
    """Add up numbers of parameters by group; groups without any are left out.

    Args:
        shapes: Number of parameters by tensor name.
    """
    totals = dict.fromkeys((*GROUPS, OTHER), 0)
    for name, count in shapes.items():
        totals[group_of(name)] += count
    return {group: count for group, count in totals.items() if count}


def selects(group_or_pattern: str) -> Callable[[str], bool]:
    """Make the test of whether a tensor belongs to a group or matches a pattern.

    Args:
        group_or_pattern: A group's name; or `re:` and a regular expression that is searched in
            the name; or a glob for the whole name (`*.attn1.*`).

    Raises:
        RecipeError: It is a mistyped group, a bad regular expression, too long, or one that only
            a search without limits can follow (`patterns.compile_pattern`).
    """
    if group_or_pattern in GROUPS:
        return lambda name: group_of(name) == group_or_pattern
    if len(group_or_pattern) > _MAX_PATTERN:
        raise RecipeError(
            f"A pattern of {len(group_or_pattern)} characters.",
            fix=f"Keep it under {_MAX_PATTERN}; add several `only(...)` up instead.",
        )
    if group_or_pattern.startswith("re:"):
        try:
            return compile_pattern(group_or_pattern[3:])
        except ConfigError as error:
            raise RecipeError(
                error.message, fix=f"{error.fix} A glob such as `*.attn1.*` works too."
            ) from error
    if group_or_pattern.isidentifier():
        raise RecipeError(
            f"There is no parameter group `{group_or_pattern}`; there are {', '.join(GROUPS)}.",
            fix=fix_unknown_name(group_or_pattern, GROUPS)
            + " A glob such as `*.attn1.*` works too.",
        )
    return lambda name: fnmatchcase(name, group_or_pattern)


@dataclass(frozen=True)
class Only(Applied):
    """A task vector restricted to some tensors; build it with `only`."""

    function: ClassVar[str] = "only"

    group: str

    def formula(self) -> str:
        """Print e.g. `only(tuned - base, "temporal")`."""
        return f"only({self.vector}, {quote(self.group)})"

    def reaches(self, name: str) -> bool:
        """Check whether a tensor is selected."""
        return selects(self.group)(name)

    def sources(self, name: str | None = None) -> Iterator[Source]:
        """Return the vector's sources, unless the tensor is not selected."""
        if name is None or self.reaches(name):
            yield from self.vector.sources(name)

    def lower(self, lowering: Lowering) -> int | None:
        """Lower the task vector where the tensor is selected; return None elsewhere."""
        return self.vector.lower(lowering) if self.reaches(lowering.name) else None

    def _is_changed(self, name: str) -> bool:
        """Return whether the task vector inside changes a tensor, selected or not."""
        return next(iter(self.vector.sources(name)), None) is not None

    def verify(self, names: Sequence[str]) -> None:
        """Check that something is selected.

        Raises:
            RecipeError: No name is; the groups that the names do have are listed. Or none that is
                selected is changed by the task vector, e.g. by a LoRA of other layers.
        """
        chosen = list(filter(selects(self.group), names))
        if chosen and not any(map(self._is_changed, chosen)):
            touched = list(filter(self._is_changed, names))
            present = sorted({group_of(name) for name in touched})
            raise RecipeError(
                f"`{self.formula()}` is nothing: `{self.vector}` changes {len(touched)} tensors, "
                f"none of which is selected; their groups are: {', '.join(present) or 'none'}.",
                fix=f"Use one of these groups, or a pattern for names like `{touched[0]}`."
                if touched
                else f"Leave `{self.vector}` out.",
            )
        if not chosen:
            present = sorted({group_of(name) for name in names})
            raise RecipeError(
                f"`only(..., {quote(self.group)})` matches none of the {len(names)} tensors; "
                f"their groups are: {', '.join(present)}.",
                fix=f"Use one of these groups, or a pattern for names like `{names[0]}`."
                if names
                else "Use a checkpoint with tensors.",
            )


def only(vector: TaskVector, group_or_pattern: str) -> TaskVector:
    """Restrict a task vector to a parameter group or a name pattern; it is zero elsewhere.

    Args:
        vector: What to restrict.
        group_or_pattern: One of `families.GROUPS`, a glob (`*.attn1.*`), or `re:` and a regular
            expression.

    Raises:
        RecipeError: `vector` is no task vector, or the group is unknown; when evaluated, if
            nothing matches.
    """
    expect_vector(vector, "only", example='only(tuned - base, "temporal")')
    if not isinstance(group_or_pattern, str):
        raise RecipeError(
            f"`only()` got the group {group_or_pattern!r}, not a string.",
            fix='Quote it: `only(tuned - base, "temporal")`.',
        )
    selects(group_or_pattern)
    return Only(vector, group_or_pattern)


def restrict(expression: AnyExpression, group_or_pattern: str | None) -> AnyExpression:
    """Restrict every difference and every LoRA in an expression, in place of what did before.

    E.g. `base + 2 * (tuned - base)` becomes `base + 2 * only(tuned - base, "temporal")`; the
    stored checkpoint at the front stays whole.

    Args:
        expression: A checkpoint or a task vector.
        group_or_pattern: As of `only`; None takes every `only` away.

    Raises:
        RecipeError: There is no such group, or the pattern is wrong.
    """
    if isinstance(expression, Checkpoint):
        vectors = tuple(restrict(one, group_or_pattern) for one in expression.vectors)
        return replace(expression, vectors=vectors)
    if isinstance(expression, Only):
        return restrict(expression.vector, group_or_pattern)
    if not _vectors_of(expression):
        return expression if group_or_pattern is None else only(expression, group_or_pattern)
    values = {
        one.name: _restricted(getattr(expression, one.name), group_or_pattern)
        for one in fields(expression)
    }
    return replace(expression, **values)


def restrictions(
    expression: Checkpoint | TaskVector, outer: str | None = None
) -> Iterator[str | None]:
    """Return what restricts each difference and each LoRA in an expression; None if nothing does.

    Args:
        expression: A checkpoint or a task vector.
        outer: What it is restricted to by what it stands in.
    """
    if isinstance(expression, Checkpoint):
        inside: Sequence[TaskVector] = expression.vectors
    else:
        inside = _vectors_of(expression)
        if isinstance(expression, Only):
            if outer not in (None, expression.group):
                yield outer  # one in the other: both restrict
            outer = expression.group
        if not inside:
            yield outer
    for one in inside:
        yield from restrictions(one, outer)


def _vectors_of(expression: TaskVector) -> list[TaskVector]:
    return [one for one in expression.children if isinstance(one, TaskVector)]


def _restricted(value: Any, group_or_pattern: str | None) -> Any:
    """Restrict the task vectors in a field of one; the rest stays as it is."""
    if isinstance(value, tuple):
        return tuple(_restricted(one, group_or_pattern) for one in value)
    return restrict(value, group_or_pattern) if isinstance(value, TaskVector) else value
