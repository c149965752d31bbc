"""Text that people write: mistyped names, and YAML without surprises. Imports nothing slow."""

from __future__ import annotations

import difflib
import io
import re
from collections.abc import Hashable, Iterable, Sequence
from typing import Any

import yaml

from motionmerge.errors import ConfigError


def nearest_name(name: str, known: Iterable[str]) -> str | None:
    """Return the known name that a mistyped one is closest to; None if none is close."""
    near = difflib.get_close_matches(name, list(known), n=1)
    return near[0] if near else None


def fix_unknown_name(name: str, known: Iterable[str]) -> str:
    """Phrase the `Fix:` line for an unknown name: the nearest known one, or all of them."""
    names = list(known)
    near = nearest_name(name, names)
    if near is not None:
        return f"Write `{near}` instead of `{name}`."
    return f"Remove `{name}`, or use one of: {', '.join(names)}."


def lines_of(text: str) -> list[str]:
    """Cut text at its newlines alone, not at U+2028 and the like; leave a byte order mark out."""
    lines = io.StringIO(text.removeprefix("\ufeff"), newline=None)
    return [line.rstrip("\n") for line in lines]


MAX_YAML = 4 << 20
_MAX_DEPTH = 50


def _check_tokens(text: str) -> None:
    """Refuse what makes little YAML grow without end, before anything is built from it.

    Raises:
        ConfigError: There is an anchor, an alias, a merge key, a tag, or too deep a nesting.
    """
    depth = 0
    for token in yaml.scan(text, Loader=yaml.SafeLoader):
        line = token.start_mark.line + 1
        if isinstance(token, _OPENING):
            depth += 1
        elif isinstance(token, _CLOSING):
            depth -= 1
        is_merge = isinstance(token, yaml.ScalarToken) and token.plain and token.value == "<<"
        if is_merge or isinstance(token, (yaml.AnchorToken, yaml.AliasToken)):
            raise ConfigError(
                f"It uses {'merge keys' if is_merge else 'anchors'} in line {line}.",
                fix="Write each value out.",
            )
        if isinstance(token, (yaml.TagToken, yaml.DirectiveToken)):
            raise ConfigError(f"It uses tags in line {line}.", fix="Write plain values.")
        if depth > _MAX_DEPTH:
            raise ConfigError(
                f"It is nested more than {_MAX_DEPTH} levels deep in line {line}.",
                fix="Write it flatter.",
            )


_OPENING = (
    yaml.BlockMappingStartToken,
    yaml.BlockSequenceStartToken,
    yaml.FlowMappingStartToken,
    yaml.FlowSequenceStartToken,
)
_CLOSING = (yaml.BlockEndToken, yaml.FlowMappingEndToken, yaml.FlowSequenceEndToken)


class _UniqueKeyLoader(yaml.SafeLoader):
    """A safe loader that refuses a mapping with the same key twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen = set()
        for key_node, _ in node.value:
            if key_node.value in seen:
                raise yaml.constructor.ConstructorError(
                    problem=f"the key `{key_node.value}` appears twice",
                    problem_mark=key_node.start_mark,
                )
            seen.add(key_node.value)
        return super().construct_mapping(node, deep=deep)


_NUMBERS = {
    "int": r"[-+]?(?:0|[1-9][0-9_]*)$",
    "float": r"[-+]?(?:[0-9][0-9_]*\.[0-9_]*|\.[0-9_]+|[0-9]+(?=[eE]))(?:[eE][-+]?[0-9]+)?$"
    r"|[-+]?\.(?:inf|Inf|INF)$|\.(?:nan|NaN|NAN)$",
}
"""Which plain text is a number: 1e3 is one as in Python, 010 is not eight and 1:30 not ninety."""

_UniqueKeyLoader.yaml_implicit_resolvers = {
    first: [one for one in resolvers if one[0].rpartition(":")[2] not in _NUMBERS]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


class _Dumper(yaml.SafeDumper):
    """A safe dumper that quotes text which we or other readers of YAML would take for a number."""


for _kind, _pattern in _NUMBERS.items():
    for _class in (_UniqueKeyLoader, _Dumper):
        _class.add_implicit_resolver(
            f"tag:yaml.org,2002:{_kind}", re.compile(_pattern), list("-+.0123456789")
        )


_SHOWN = 100
"""Characters of a line that a message repeats."""


def with_caret(line: str, column: int) -> str:
    """Return a line, or the part of it around a column, above a caret that points at the column."""
    start = max(0, column - _SHOWN // 2) if len(line) > _SHOWN else 0
    return f"    {line[start : start + _SHOWN]}\n    {' ' * (column - start)}^"


def at_line(message: str, text: str, place: Sequence[int | str], *, source: str) -> str:
    """Add to a message where its cause is: `recipe.yaml:7: ...`, the line, and a caret.

    Args:
        message: What is wrong.
        text: The YAML that it is wrong in.
        place: The keys and positions that lead there; a key that the text lacks ends the way.
        source: The file.
    """
    node = yaml.compose(text, Loader=yaml.SafeLoader)
    mark = None
    for step in place:
        found = _step_into(node, step)
        if found is None:
            break
        mark, node = found
    if mark is None:
        return f"{source}: {message}"
    caret = "" if "^" in message else f"\n{_line_of(text, mark)}"  # an expression has its own
    return f"{source}:{mark.line + 1}: {message}{caret}"


def _step_into(node: yaml.Node | None, step: int | str) -> tuple[yaml.Mark, yaml.Node] | None:
    """Return where a key or an entry begins, and what is below it."""
    if isinstance(node, yaml.MappingNode):
        return next((((k.start_mark, v)) for k, v in node.value if k.value == str(step)), None)
    if isinstance(node, yaml.SequenceNode) and isinstance(step, int):
        return node.value[step].start_mark, node.value[step]
    return None


def _line_of(text: str, mark: yaml.Mark) -> str:
    line = re.split("\r\n|[\r\n\x85\u2028\u2029]", text)[mark.line]
    return with_caret(line, mark.column)


def parse_yaml(text: str, *, source: str) -> Any:
    """Parse YAML with plain values only, refusing duplicate keys, anchors and merge keys.

    Args:
        text: The document.
        source: Where it came from, for the error message.

    Raises:
        ConfigError: The text is not such YAML; line and column are named. Or it is too long.
    """
    if len(text) > MAX_YAML:
        raise ConfigError(
            f"{source} has more than {MAX_YAML:,} characters.", fix="Write a shorter file."
        )
    try:
        _check_tokens(text)
        return yaml.load(text, Loader=_UniqueKeyLoader)
    except ConfigError as error:
        raise ConfigError(
            f"{source} is not valid YAML of plain values: {error.message}", fix=error.fix
        ) from None
    except yaml.MarkedYAMLError as error:
        marks = [mark for mark in (error.problem_mark, error.context_mark) if mark is not None]
        message = f"is not valid YAML: {error.problem or error.context}."
        if not marks:
            raise ConfigError(f"{source} {message}", fix="Write plain YAML.") from error
        # What is not closed is noticed at the end only; it begins where the context does.
        mark = marks[-1] if "stream end" in message else marks[0]
        raise ConfigError(
            f"{source}:{mark.line + 1} {message}\n{_line_of(text, mark)}",
            fix="Correct the line named above.",
        ) from error
    except (yaml.YAMLError, TypeError, ValueError, RecursionError) as error:
        raise ConfigError(
            f"{source} is not valid YAML: {error}", fix="Correct the line named above."
        ) from error


def write_yaml(value: Any, *, is_one_line: bool = False) -> str:
    """Write plain values as YAML, keys in their order; `parse_yaml` reads them back.

    Args:
        value: Mappings, lists, text and numbers.
        is_one_line: Write it within braces.
    """
    return yaml.dump(
        value,
        Dumper=_Dumper,
        default_flow_style=is_one_line,
        sort_keys=False,
        allow_unicode=True,
        width=10**9,  # lines are never wrapped
    )
