"""Fused projections: one matrix whose rows are those of several, in their order.

    to_qkv = [to_q; to_k; to_v],   hence   up_qkv @ down = [up_q @ down; up_k @ down; up_v @ down]

Names are flat: underscores stand for dots.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from motionmerge.errors import ShapeError

_QKV = (
    ("to_q", "to_k", "to_v"),
    ("q_proj", "k_proj", "v_proj"),
    ("to_query", "to_key", "to_value"),
    ("query", "key", "value"),
    ("q", "k", "v"),
)


@dataclass(frozen=True)
class Fusion:
    """A kind of fused projection.

    Attributes:
        wholes: How models call the fused one.
        splits: How models call its parts, in the order of their rows.
        sizes: A letter for each part; parts with the same letter have the same number of rows.
    """

    wholes: tuple[str, ...]
    splits: tuple[tuple[str, ...], ...]
    sizes: str

    def rows(self, known: Mapping[int, int], total: int, *, where: str) -> list[slice]:
        """Compute which rows of the fused matrix belong to each part.

        Args:
            known: Rows of some of the parts, by their number.
            total: Rows of the fused matrix.
            where: What is dealt with, for the error.

        Raises:
            ShapeError: They do not add up.
        """
        sizes = {self.sizes[part]: count for part, count in known.items()}
        unknown = [letter for letter in self.sizes if letter not in sizes]
        rest = total - sum(sizes.get(letter, 0) for letter in self.sizes)
        if unknown:
            sizes[unknown[0]] = rest // len(unknown)
        counts = [sizes[letter] for letter in self.sizes]
        agree = all(counts[part] == count for part, count in known.items())
        if not agree or sum(counts) != total or min(counts) < 1:
            found = " + ".join(str(known.get(part, "?")) for part in range(len(counts)))
            raise ShapeError(
                f"The rows of {where} do not add up: {found} are not {total}.",
                fix="Use a LoRA for this model; its projections have other sizes.",
            )
        return [slice(sum(counts[:part]), sum(counts[: part + 1])) for part in range(len(counts))]


FUSIONS: tuple[Fusion, ...] = (
    Fusion(("to_qkv", "qkv", "qkv_proj"), _QKV, "abb"),
    Fusion(("to_kv", "kv", "kv_proj"), tuple(split[1:] for split in _QKV), "aa"),
    Fusion(("to_added_qkv",), (("add_q_proj", "add_k_proj", "add_v_proj"),), "abb"),
    Fusion(("to_added_kv",), (("add_k_proj", "add_v_proj"),), "aa"),
    Fusion(("norms_linear",), (("norm1_linear", "norm2_linear"),), "aa"),
    Fusion(("attn_to_qkv_mlp",), (("attn_to_q", "attn_to_k", "attn_to_v", "proj_mlp"),), "aaab"),
)
"""Queries have as many rows as keys and values or, if heads share those, more."""


def parts_of(flat: str) -> Iterator[tuple[Fusion, tuple[str, ...]]]:
    """Return the parts that a fused path may consist of, or its other names alone.

    Args:
        flat: A module's path, e.g. `blocks_0_attn_qkv`.
    """
    for fusion in FUSIONS:
        for whole in fusion.wholes:
            if (stem := _stem(flat, whole)) is not None:
                for split in fusion.splits:
                    yield fusion, tuple(stem + part for part in split)
                for other in fusion.wholes:
                    yield fusion, (stem + other,)


def wholes_of(flat: str) -> Iterator[tuple[Fusion, int, str]]:
    """Return the fused paths that a path may be a part of, with its number among the parts.

    Args:
        flat: A module's path, e.g. `blocks_0_attn_to_q`.
    """
    for fusion in FUSIONS:
        for split in fusion.splits:
            for number, part in enumerate(split):
                if (stem := _stem(flat, part)) is not None:
                    for whole in fusion.wholes:
                        yield fusion, number, stem + whole


def _stem(flat: str, ending: str) -> str | None:
    """Return what is before an ending that begins where a name does."""
    stem = flat.removesuffix(ending)
    return stem if flat.endswith(ending) and stem[-1:] in ("", "_") else None
