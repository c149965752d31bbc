"""All files of an export: what each holds, what loads them, what the inputs lacked."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TypeVar

Export = TypeVar("Export", covariant=True)


@dataclass(frozen=True)
class Exports(Mapping[str, Export]):
    """All files of an export, by name without ending.

    Attributes:
        files: The files.
        usage: Which tools load them and what to type there, line by line.
        unmatched: Tensors that no task vector changes, as some inputs lack them, with those inputs.
    """

    files: Mapping[str, Export]
    usage: tuple[str, ...]
    unmatched: Mapping[str, tuple[str, ...]]

    def __getitem__(self, name: str) -> Export:
        return self.files[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.files)

    def __len__(self) -> int:
        return len(self.files)
