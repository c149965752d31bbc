"""How tables of names are written and read: templates of paths, fused layers, the order of rows.

A table maps a path of the original code to one of diffusers; `{}` stands for a block's number.
Where the original has one layer for several of diffusers, the table has the name that diffusers
gives them when it fuses them (`fuse_qkv_projections`); `attn.to_qkv_mlp` is ours.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property, lru_cache

Order = tuple[tuple[int, int], ...]
"""The parts of an original layer's rows as they follow one another: for each, the number of the
layer of diffusers that it belongs to, and its number among the parts of that one."""

SWAPPED: Order = ((0, 1), (0, 0))
"""Two halves of one layer, the second of which comes first in the original."""

_PARTS: Mapping[str, tuple[str, ...]] = {
    "attn.to_qkv_mlp": ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"),
    "to_qkv": ("to_q", "to_k", "to_v"),
    "to_kv": ("to_k", "to_v"),
    "to_added_qkv": ("add_q_proj", "add_k_proj", "add_v_proj"),
    "to_added_kv": ("add_k_proj", "add_v_proj"),
    "norms.linear": ("norm1.linear", "norm2.linear"),
}
"""What the fused layers consist of, in the order of their rows; `norms.linear` is ours."""

_DIGITS = re.compile(r"\d+")
_LEAVES = frozenset({"weight", "bias"})


@dataclass(frozen=True, kw_only=True)
class Names:
    """One way of naming the tensors of a family, beside that of diffusers.

    Attributes:
        family: The family, as in `families.py` where it is there.
        style: What this way of naming is called, for messages.
        table: Path of the original -> path in diffusers. Each of the two is there once.
        also: Further paths of the original that are read and never written.
        orders: Where the original's rows stand in another order, by path of the original.
        interleaved: Fused paths whose rows are dealt by head (q, k and v of the first head, those
            of the second ...), with the path of a tensor that has as many rows as a head.
        alike: Fused paths of unequal parts, with a path whose rows are as many as those of every
            part but the last.
        ones: Dimensions of size one that the original has before and behind those of diffusers, by
            the tensor's name.
        computed: Patterns of buffers that the original stores and diffusers computes.
    """

    family: str
    style: str
    table: Mapping[str, str]
    also: Mapping[str, str] = field(default_factory=dict)
    orders: Mapping[str, Order] = field(default_factory=dict)
    interleaved: Mapping[str, str] = field(default_factory=dict)
    alike: Mapping[str, str] = field(default_factory=dict)
    ones: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    computed: tuple[str, ...] = ()

    @cached_property
    def theirs(self) -> Templates:
        """The paths of the original, `also` among them."""
        return Templates([*self.table, *self.also])

    @cached_property
    def written(self) -> Templates:
        """The paths of the original without `also`."""
        return Templates(self.table)

    @cached_property
    def ours(self) -> Templates:
        """The paths of diffusers, those of fused layers one by one."""
        return Templates(self.homes)

    @cached_property
    def homes(self) -> Mapping[str, str]:
        """By path in diffusers, the path of the original that holds it."""
        return {part: path for path, ours in self.table.items() for part in parts_of(ours)}

    @cached_property
    def _computed(self) -> re.Pattern[str]:
        return re.compile("|".join(self.computed) or r"(?!)")

    def is_computed(self, name: str) -> bool:
        """Check whether a tensor of the original is a buffer that diffusers computes."""
        return self._computed.search(name) is not None

    def ours_of(self, path: str) -> str:
        """Return the path in diffusers of a path of the original, both as templates."""
        return self.table[path] if path in self.table else self.also[path]

    def is_reordered(self, path: str) -> bool:
        """Check whether the original has a path's rows in another order."""
        return path in self.orders or path in self.interleaved


class Templates:
    """Finds the template that a path fits; `{}` stands for a number."""

    def __init__(self, templates: Iterable[str]) -> None:
        self._known: dict[str, list[str]] = {}
        for template in templates:
            shape = _without_numbers(template.replace("{}", "#"))
            self._known.setdefault(shape, []).append(template)

    def find(self, path: str) -> tuple[str, str] | None:
        """Return the template of a path and its number, empty if it has none; None if none fits."""
        for template in self._known.get(_without_numbers(path), ()):
            if found := _pattern(template).fullmatch(path):
                return template, found[1] if found.groups() else ""
        return None

    def find_tensor(self, name: str) -> tuple[str, str, str] | None:
        """Return template, number and ending of a tensor's name: of a weight, a bias or itself."""
        if found := self.find(name):
            return *found, ""
        path, dot, leaf = name.rpartition(".")
        if leaf in _LEAVES and (found := self.find(path)):
            return *found, dot + leaf
        return None

    def all_occur(self, names: Iterable[str]) -> bool:
        """Check whether each template has a tensor among some names."""
        found = {match[0] for name in names if (match := self.find_tensor(name))}
        return found == {template for known in self._known.values() for template in known}


@lru_cache(maxsize=1 << 14)  # every table looks up the same names
def _without_numbers(path: str) -> str:
    return _DIGITS.sub("#", path)


@lru_cache(maxsize=1 << 14)
def _pattern(template: str) -> re.Pattern[str]:
    return re.compile(re.escape(template).replace(r"\{\}", r"(\d+)"))


def parts_of(ours: str) -> tuple[str, ...]:
    """Return the paths that a fused path of diffusers consists of, or the path itself."""
    for whole, parts in _PARTS.items():
        if ours.endswith(f".{whole}"):
            return tuple(ours.removesuffix(whole) + part for part in parts)
    return (ours,)


def numbered(template: str, number: str) -> str:
    """Insert a block's number into a template."""
    return template.replace("{}", number)
