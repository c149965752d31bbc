"""Read short expressions that people write: Python's syntax tree, and nothing is executed.

A fault is reported with a caret under the guilty column.
"""

from __future__ import annotations

import ast
import math
import warnings
from collections.abc import Callable
from typing import Any

from motionmerge.errors import RecipeError
from motionmerge.text import with_caret

MAX_LENGTH = 2000
"""Longest expression in characters."""
MAX_DEPTH = 40
"""Deepest nesting of an expression."""


class ExpressionReader:
    """What the readers of experts and of knobs share; each of them walks the tree itself.

    Args:
        text: One expression; line breaks count as spaces.
        where: What the text is, for error messages, e.g. `experts.dynamics`.
        shorter: What to do about one that is too long.
    """

    def __init__(self, text: str, where: str, *, shorter: str) -> None:
        self._text, self._where = " ".join(text.split()), where
        if len(self._text) > MAX_LENGTH:
            raise RecipeError(
                f"{where} has {len(self._text)} characters; {MAX_LENGTH} are allowed.", fix=shorter
            )

    def _tree(self) -> ast.expr:
        """Parse the text.

        Raises:
            RecipeError: It is no expression.
        """
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", SyntaxWarning)
                warnings.simplefilter("ignore", DeprecationWarning)
                return ast.parse(self._text, mode="eval").body
        except SyntaxError as error:
            column = min(max((error.offset or 1) - 1, 0), len(self._text))
            raise self._fault(
                column, f"Cannot be read: {error.msg}.", fix="Correct the expression there."
            ) from None
        except (ValueError, RecursionError, MemoryError) as error:
            message = f"Cannot be read: {error}."
            raise self._fault(0, message, fix="Write a simpler expression.") from None

    def _number(self, node: ast.Constant, *, instead: str) -> int | float:
        """Return the number at a place.

        Raises:
            RecipeError: It is none, or more than 64 bits hold; `instead` is what was expected.
        """
        value = node.value
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise self._fault(node, f"Expected {instead} here.", fix="Write a number.")
        if abs(value) >= 1 << 63 or not math.isfinite(value):
            raise self._fault(node, "This number is too large.", fix="Write a smaller number.")
        return value

    def _build(self, place: ast.expr | int, make: Callable[[], Any]) -> Any:
        """Make a value; point at `place` if it is refused."""
        try:
            return make()
        except RecipeError as error:
            raise self._fault(place, error.message, fix=error.fix) from None

    def _column(self, byte_offset: int | None) -> int:
        return len(self._text.encode()[: byte_offset or 0].decode(errors="ignore"))

    def _fault(self, place: ast.expr | int, message: str, *, fix: str | None) -> RecipeError:
        column = place if isinstance(place, int) else self._column(place.col_offset)
        return self._refused(f"{self._where}: {message}\n{with_caret(self._text, column)}", fix=fix)

    def _refused(self, message: str, *, fix: str | None) -> RecipeError:
        return RecipeError(message, fix=fix)
