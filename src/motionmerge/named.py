"""Numbers that a recipe calls by name: they compute as their value and print as they are written.

With `parameters: {motion: 0.25}`, the factor of `base - motion * (tuned - base)` is 0.25 wherever
it is computed with, and `motion` wherever it is printed.
"""

from __future__ import annotations

from typing import Any


class _Named:
    """What the two classes below share.

    Attributes:
        text: The number as a recipe writes it, e.g. `motion` or `0.75 * motion`.
    """

    text: str

    def __reduce__(self) -> tuple[Any, ...]:
        return named, (_plain(self), self.text)

    def __neg__(self) -> Any:
        text = self.text[1:] if self.text.startswith("-") else f"-{self.text}"
        return named(-_plain(self), text)

    def __mul__(self, other: object) -> Any:
        if not isinstance(other, (int, float)):
            return NotImplemented
        return named(_plain(self) * other, f"{self.text} * {number_text(other)}")

    def __rmul__(self, other: object) -> Any:
        if not isinstance(other, (int, float)):
            return NotImplemented
        return named(other * _plain(self), f"{number_text(other)} * {self.text}")


class NamedFloat(_Named, float):
    """A real number with a name."""

    def __new__(cls, value: float, text: str) -> NamedFloat:
        """Make the number; `text` is how it prints."""
        number = float.__new__(cls, value)
        number.text = text
        return number


class NamedInt(_Named, int):
    """An integer with a name, for seeds and ranks."""

    def __new__(cls, value: int, text: str) -> NamedInt:
        """Make the number; `text` is how it prints."""
        number = int.__new__(cls, value)
        number.text = text
        return number


def _plain(number: Any) -> Any:
    return number.real  # float or int itself, without a name


def named(value: float, text: str) -> NamedFloat | NamedInt:
    """Return a number that prints as a name.

    Args:
        value: The number; an integer stays one.
        text: How a recipe writes it.
    """
    return NamedInt(value, text) if isinstance(value, int) else NamedFloat(value, text)


def number_text(value: float) -> str:
    """Write a number as a recipe does: by its name, if it has one."""
    return value.text if isinstance(value, (NamedFloat, NamedInt)) else repr(value)
