r"""Regular expressions of strangers, searched in time that grows with the name and not beyond.

Python's own engine tries one way after another, so `(.*)*z` can run for hours and nothing stops it.
Here all ways are followed at once, as sets of states (Thompson 1968). The syntax is Python's; what
needs memory of what was matched before (`\\1`, atomic groups) is refused by name.
"""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

from motionmerge.errors import ConfigError

MAX_PATTERN = 1000
MAX_TEXT = 1000
_MAX_STATES = 5000
_MAX_STEPS = 100_000
_MAX_REMEMBERED = 50_000

_PARSER: Any = importlib.import_module("re._parser" if sys.version_info >= (3, 11) else "sre_parse")
_UNBOUNDED = int(_PARSER.MAXREPEAT)
_FLAGS = re.IGNORECASE | re.DOTALL | re.VERBOSE | re.UNICODE
_REFUSED = {
    "GROUPREF": "a backreference",
    "GROUPREF_EXISTS": "a conditional group",
    "ATOMIC_GROUP": "an atomic group",
    "POSSESSIVE_REPEAT": "a possessive quantifier",
}

Test = Callable[[str, int, "_Steps"], bool]
"""Does a place in a text fulfil a condition that takes no letter, such as `^` or `(?!..)`?"""


class _Refused(ValueError):
    """A construct of a pattern that is not supported here."""


@dataclass
class _State:
    """One state: reads a letter, or passes a test, or goes on to several; or it is the end."""

    letter: Callable[[str], bool] | None = None
    test: Test | None = None
    after: list[int] = field(default_factory=list)


@lru_cache(maxsize=1000)
def compile_pattern(pattern: str) -> Callable[[str], bool]:
    r"""Return the test of whether a regular expression is found anywhere in a name.

    Anchor it with `^`, `\\A`, `$` or `\\Z` where Python's `match` and `fullmatch` are meant.

    Raises:
        ConfigError: It is no regular expression, too long, or needs what only a search without
            limits can do. From the test: the name is too long.
    """
    if len(pattern) > MAX_PATTERN:
        raise ConfigError(
            f"A pattern of {len(pattern)} characters.", fix=f"Keep it under {MAX_PATTERN}."
        )
    try:
        parsed = _PARSER.parse(pattern)
        if parsed.state.flags & ~_FLAGS:
            raise _Refused("a flag other than (?i), (?s) and (?x)")
        machine = _Machine(parsed, parsed.state.flags)
    except _Refused as error:
        raise ConfigError(
            f"The pattern `{pattern}` has {error}, which could take for ever.",
            fix="Write it without, or as several patterns.",
        ) from error
    except (re.error, RecursionError, OverflowError) as error:
        raise ConfigError(
            f"`{pattern}` is not a regular expression: {error}.", fix="Correct it."
        ) from error
    return _Search(pattern, machine, _literals(parsed, parsed.state.flags))


class _Search:
    """A pattern ready to be searched; what it said of a name is remembered."""

    def __init__(self, pattern: str, machine: _Machine, literals: Sequence[str]) -> None:
        self._literals = literals
        self._pattern = pattern
        self._machine = machine
        # With one choice Python's engine cannot take long, and it is twenty times as fast.
        self._quick = re.compile(pattern) if machine.num_choices < 2 else None
        self._known: dict[str, bool] = {}

    def __call__(self, text: str) -> bool:
        if len(text) > MAX_TEXT:
            raise ConfigError(
                f"The pattern `{self._pattern}` meets a name of {len(text)} characters, "
                f"`{text[:60]}..`.",
                fix=f"Use weights whose names have at most {MAX_TEXT} characters.",
            )
        if self._quick is not None:
            return self._quick.search(text) is not None
        # Most names lack a word that the pattern asks for, which is seen in no time.
        if not all(word in text for word in self._literals):
            return False
        found = self._known.get(text)
        if found is None:
            steps = _Steps(self._pattern)
            found = self._machine.accepts(text, 0, steps=steps, starts=range(len(text) + 1))
            if len(self._known) >= _MAX_REMEMBERED:
                self._known.clear()
            self._known[text] = found
        return found


class _Steps:
    """Counts what a search does: conditions within conditions multiply."""

    def __init__(self, pattern: str) -> None:
        self._pattern = pattern
        self._left = _MAX_STEPS

    def take(self) -> None:
        """Count one more.

        Raises:
            ConfigError: It is one too many.
        """
        self._left -= 1
        if self._left < 0:
            raise ConfigError(
                f"The pattern `{self._pattern}` takes more than {_MAX_STEPS} steps.",
                fix="Write it without look-aheads, or as several patterns.",
            )


class _Machine:
    """The states of a pattern, and the sets of them that were met so far.

    Attributes:
        num_choices: How many repeats, branches and conditions it has. An engine that tries one
            way after another multiplies them.
    """

    def __init__(self, parsed: Any, flags: int) -> None:
        self.num_choices = 0
        self._states: list[_State] = []
        self._end = self._add(_State())
        self._begin = self._sequence(parsed, flags, self._end)
        self._closures: dict[frozenset[int], frozenset[int] | None] = {}
        self._moves: dict[tuple[frozenset[int], str], frozenset[int]] = {}

    def accepts(self, text: str, position: int, *, steps: _Steps, starts: range) -> bool:
        """Check whether a way through the states begins at one of `starts`, from `position` on."""
        states: frozenset[int] = frozenset()
        while True:
            steps.take()
            if position in starts:
                states |= {self._begin}
            elif not states:
                return False
            states = self._closure(states, text, position, steps)
            if self._end in states:
                return True
            if position == len(text):
                return False
            states = self._move(states, text[position])
            position += 1

    def _closure(
        self, states: frozenset[int], text: str, position: int, steps: _Steps
    ) -> frozenset[int]:
        """Add the states that are reached without a letter."""
        known = self._closures.get(states)  # None as well where it depends on the place
        if known is not None:
            return known
        reached, tested, open_ = set(states), False, list(states)
        while open_:
            state = self._states[open_.pop()]
            if state.letter is not None:
                continue
            if state.test is not None:
                tested = True
                if not state.test(text, position, steps):
                    continue
            new = [one for one in state.after if one not in reached]
            reached.update(new)
            open_ += new
        result = frozenset(reached)
        if len(self._closures) >= _MAX_REMEMBERED:
            self._closures.clear()
        self._closures[states] = None if tested else result
        return result

    def _move(self, states: frozenset[int], letter: str) -> frozenset[int]:
        """Follow the states that read a letter."""
        result = self._moves.get((states, letter))
        if result is None:
            found = (self._states[one] for one in states)
            result = frozenset(
                after
                for state in found
                if state.letter is not None and state.letter(letter)
                for after in state.after
            )
            if len(self._moves) >= _MAX_REMEMBERED:
                self._moves.clear()
            self._moves[states, letter] = result
        return result

    def _add(self, state: _State) -> int:
        if len(self._states) >= _MAX_STATES:
            raise _Refused(f"more than {_MAX_STATES} states once its repeats are written out")
        self._states.append(state)
        return len(self._states) - 1

    def _sequence(self, parts: Any, flags: int, after: int) -> int:
        """Build parts from the last to the first; return the state that begins them."""
        for operation, argument in reversed(list(parts)):
            after = self._part(str(operation), argument, flags, after)
        return after

    def _part(self, operation: str, argument: Any, flags: int, after: int) -> int:
        if operation in _REFUSED:
            raise _Refused(_REFUSED[operation])
        if operation == "SUBPATTERN":
            _, added, removed, inner = argument
            if (added | removed) & ~_FLAGS:
                raise _Refused("a flag other than (?i), (?s) and (?x)")
            return self._sequence(inner, (flags | added) & ~removed, after)
        if operation == "BRANCH":
            self.num_choices += 1
            ways = [self._sequence(way, flags, after) for way in argument[1]]
            return self._add(_State(after=ways))
        if operation in ("MAX_REPEAT", "MIN_REPEAT"):
            return self._repeat(*argument, flags=flags, after=after)
        if operation == "AT":
            return self._add(_State(test=_place(str(argument)), after=[after]))
        if operation in ("ASSERT", "ASSERT_NOT"):
            test = self._look(*argument, flags=flags, wanted=operation == "ASSERT")
            return self._add(_State(test=test, after=[after]))
        return self._add(_State(letter=_letter(operation, argument, flags), after=[after]))

    def _repeat(self, least: int, most: int, inner: Any, *, flags: int, after: int) -> int:
        """Write a repeat out; whether it is greedy makes no difference to whether it is found."""
        self.num_choices += 1
        if most == _UNBOUNDED:
            loop = self._add(_State())
            self._states[loop].after = [self._sequence(inner, flags, loop), after]
            after = loop
        else:
            end = after
            for _ in range(most - least):
                after = self._add(_State(after=[self._sequence(inner, flags, after), end]))
        for _ in range(least):
            self._add(_State())  # so that repeats of nothing are counted as well
            after = self._sequence(inner, flags, after)
        return after

    def _look(self, direction: int, inner: Any, *, flags: int, wanted: bool) -> Test:
        """Return the test of a look-ahead, or of a look-behind, whose width Python has checked."""
        self.num_choices += 2
        machine = _Machine(inner, flags)
        width = inner.getwidth()[0] if direction < 0 else 0

        def test(text: str, position: int, steps: _Steps) -> bool:
            begin = position - width
            seen = text[:position] if direction < 0 else text
            found = begin >= 0 and machine.accepts(
                seen, begin, steps=steps, starts=range(begin, begin + 1)
            )
            return found is wanted

        return test


def _letter(operation: str, argument: Any, flags: int) -> Callable[[str], bool]:
    """Return the test of one letter."""
    if operation == "ANY":
        return (lambda letter: True) if flags & re.DOTALL else (lambda letter: letter != "\n")
    if operation == "NOT_LITERAL":
        items, negated = [("LITERAL", argument)], True
    else:
        items = [(str(kind), value) for kind, value in argument] if operation == "IN" else []
        items = items or [(operation, argument)]
        negated = items[0][0] == "NEGATE"
    items = [item for item in items if item[0] != "NEGATE"]

    def test(letter: str) -> bool:
        cases = {letter, letter.lower(), letter.upper()} if flags & re.IGNORECASE else {letter}
        found = any(_is_among(one, items) for one in cases if len(one) == 1)
        return found is not negated

    if items[0][0] not in ("LITERAL", "RANGE", "CATEGORY"):
        raise _Refused(f"`{operation.lower()}`")
    return test


def _is_among(letter: str, items: Sequence[tuple[str, Any]]) -> bool:
    code = ord(letter)
    for kind, value in items:
        if kind == "LITERAL" and code == value:
            return True
        if kind == "RANGE" and value[0] <= code <= value[1]:
            return True
        if kind == "CATEGORY" and _has_category(letter, str(value)):
            return True
    return False


def _has_category(letter: str, category: str) -> bool:
    kind = category.removeprefix("CATEGORY_").removeprefix("NOT_")
    tests = {"DIGIT": str.isdecimal, "SPACE": str.isspace, "WORD": _is_word}
    return tests[kind](letter) is not ("NOT_" in category)


def _is_word(letter: str) -> bool:
    return letter.isalnum() or letter == "_"


def _place(name: str) -> Test:
    """Return the test of an anchor or a word's edge."""

    def at_edge(text: str, position: int, _: object) -> bool:
        before = position > 0 and _is_word(text[position - 1])
        return before is not (position < len(text) and _is_word(text[position]))

    tests: dict[str, Test] = {
        "AT_BEGINNING": lambda text, position, _: position == 0,
        "AT_BEGINNING_STRING": lambda text, position, _: position == 0,
        "AT_END": lambda text, position, _: text[position:] in ("", "\n"),
        "AT_END_STRING": lambda text, position, _: position == len(text),
        "AT_BOUNDARY": at_edge,
        "AT_NON_BOUNDARY": lambda text, position, _: bool(text) and not at_edge(text, position, _),
    }
    if name not in tests:
        raise _Refused(f"`{name.lower()}`")
    return tests[name]


def _literals(parsed: Any, flags: int) -> list[str]:
    """List runs of letters that every text with the pattern in it must hold."""
    runs = [""]
    for operation, argument in parsed:
        if str(operation) == "LITERAL":
            runs[-1] += chr(argument)
        elif str(operation) != "AT":
            runs.append("")
    return [] if flags & re.IGNORECASE else [run for run in runs if run]
