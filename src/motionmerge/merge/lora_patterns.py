"""Patterns of layer names as peft matches them, in time that a hostile pattern cannot stretch.

peft asks `re.match(rf"(.*\\.)?({pattern})$", path)`. Here the same expression is parsed by Python's
own parser and carried out on sets of positions, which takes at most (length of the path)^2 for
each element of the pattern, whatever is nested in what.
"""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Iterable
from functools import lru_cache
from typing import Any

_INSIDE = "re._" if sys.version_info >= (3, 11) else "sre_"
ops: Any = importlib.import_module(f"{_INSIDE}constants")
parser: Any = importlib.import_module(f"{_INSIDE}parse" + ("r" if _INSIDE == "re._" else ""))

_MAX_LENGTH = 2_000
_MAX_STEPS = 200_000
_SIMPLE = re.compile(r"\^?(?:[\w.\-]|\\[.\d\w])*")
"""Patterns without choices: Python's own matcher is quick with them, whatever they are."""


class PatternError(ValueError):
    """A pattern cannot be used."""


def first_match(patterns: Iterable[str], path: str) -> str | None:
    """Give the first of some patterns that fits a layer's path, or None.

    Raises:
        PatternError: One that is reached is no pattern, too long, or beyond this matcher.
    """
    return next((pattern for pattern in patterns if fits(pattern, path)), None)


def fits(pattern: str, path: str) -> bool:
    """Tell whether peft would apply a pattern to a layer.

    Raises:
        PatternError: See `first_match`.
    """
    if not isinstance(pattern, str) or len(pattern) > _MAX_LENGTH:
        raise PatternError(f"a pattern of more than {_MAX_LENGTH} characters, or no text")
    if _SIMPLE.fullmatch(pattern):
        return _compiled(pattern).match(path) is not None
    return bool(_Matcher(path).run(_parsed(pattern), {0}))


def _as_peft(pattern: str) -> str:
    return rf"(.*\.)?({pattern})$"


@lru_cache(maxsize=4096)
def _compiled(pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(_as_peft(pattern))
    except (re.error, OverflowError) as error:
        raise PatternError(f"`{pattern[:100]}` is no regular expression: {error}") from error


@lru_cache(maxsize=1024)
def _parsed(pattern: str) -> Any:
    try:
        tree = parser.parse(_as_peft(pattern))
    except (re.error, RecursionError, OverflowError) as error:
        raise PatternError(f"`{pattern[:100]}` is no regular expression: {error}") from error
    if tree.state.flags & ~re.UNICODE:
        raise PatternError(f"`{pattern[:100]}` has flags, which are not supported")
    return tree


class _Matcher:
    """Carries out a parsed pattern on a text, on all positions at once."""

    def __init__(self, text: str) -> None:
        self._text, self._steps = text, 0

    def run(self, tree: Any, starts: set[int]) -> set[int]:
        """Give the positions that a sequence can lead to from others."""
        for op, value in tree:
            if not starts:
                break
            self._steps += 1
            if self._steps > _MAX_STEPS:
                raise PatternError("a pattern that takes too long")
            starts = self._step(op, value, starts)
        return starts

    def _step(self, op: Any, value: Any, starts: set[int]) -> set[int]:
        if op in (ops.MAX_REPEAT, ops.MIN_REPEAT):
            least, most, inner = value
            return self._repeat(least, most, inner, starts)
        if op is ops.SUBPATTERN:
            _, add, remove, inner = value
            if add or remove:
                raise PatternError("flags inside a pattern are not supported")
            return self.run(inner, starts)
        if op is ops.BRANCH:
            return set().union(*(self.run(branch, starts) for branch in value[1]))
        if op is ops.AT:
            return {at for at in starts if _is_at(value, at, self._text)}
        text = self._text
        return {at + 1 for at in starts if at < len(text) and _takes(op, value, text[at])}

    def _repeat(self, least: int, most: Any, inner: Any, starts: set[int]) -> set[int]:
        for _ in range(least):
            before, starts = starts, self.run(inner, starts)
            if starts == before:  # and so for ever
                break
        reached, front = set(starts), starts
        for _ in range(min(most - least, len(self._text) + 1)):
            front = self.run(inner, front) - reached
            if not front:
                break
            reached |= front
        return reached


def _takes(op: Any, value: Any, sign: str) -> bool:
    if op is ops.ANY:
        return sign != "\n"
    if op is ops.LITERAL:
        return bool(ord(sign) == value)
    if op is ops.NOT_LITERAL:
        return bool(ord(sign) != value)
    if op is ops.IN:
        negated = bool(value) and value[0][0] is ops.NEGATE
        found = any(_is_in(kind, one, sign) for kind, one in value if kind is not ops.NEGATE)
        return found is not negated
    raise PatternError(f"`{str(op).lower()}` in a pattern is not supported")


def _is_in(op: Any, value: Any, sign: str) -> bool:
    if op is ops.RANGE:
        return bool(value[0] <= ord(sign) <= value[1])
    if op is ops.CATEGORY:
        name = _CATEGORIES.get(value)
        if name is None:
            raise PatternError(f"`{value}` in a pattern is not supported")
        return re.fullmatch(name, sign) is not None
    return _takes(op, value, sign)


_CATEGORIES = {
    ops.CATEGORY_DIGIT: r"\d",
    ops.CATEGORY_NOT_DIGIT: r"\D",
    ops.CATEGORY_SPACE: r"\s",
    ops.CATEGORY_NOT_SPACE: r"\S",
    ops.CATEGORY_WORD: r"\w",
    ops.CATEGORY_NOT_WORD: r"\W",
}


def _is_at(place: Any, at: int, text: str) -> bool:
    if place in (ops.AT_BEGINNING, ops.AT_BEGINNING_STRING):
        return at == 0
    if place in (ops.AT_END, ops.AT_END_STRING):
        return at == len(text)
    before, after = (text[i : i + 1] for i in (at - 1, at)) if at else ("", text[:1])
    is_edge = _is_word(before) is not _is_word(after)
    if place in (ops.AT_BOUNDARY, ops.AT_NON_BOUNDARY):
        return is_edge is (place is ops.AT_BOUNDARY)
    raise PatternError(f"`{place}` in a pattern is not supported")


def _is_word(sign: str) -> bool:
    return re.fullmatch(r"\w", sign) is not None
