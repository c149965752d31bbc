"""Text that people write: mistyped names, and YAML without surprises. Imports nothing slow."""

from __future__ import annotations

import difflib
import io
from collections.abc import Hashable, Iterable
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
    except (yaml.YAMLError, TypeError, ValueError, RecursionError) as error:
        raise ConfigError(
            f"{source} is not valid YAML: {error}", fix="Correct the line named above."
        ) from error
