"""What the original code of a family calls its layers, beside the names of diffusers.

The tables are in `names/`; here is what is asked of them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cache

from motionmerge.errors import ShapeError
from motionmerge.merging.names.cogvideox import COGVIDEOX_COMFYUI_STYLE, COGVIDEOX_STYLE
from motionmerge.merging.names.cosmos import COSMOS_2_STYLE, COSMOS_STYLE
from motionmerge.merging.names.dynamicrafter import dynamicrafter_style
from motionmerge.merging.names.hunyuan import (
    HUNYUAN_15_COMFYUI_STYLE,
    HUNYUAN_15_STYLE,
    HUNYUAN_COMFYUI_STYLE,
    HUNYUAN_STYLE,
)
from motionmerge.merging.names.kandinsky import KANDINSKY_5_STYLE
from motionmerge.merging.names.ltx import LTX_2_STYLE, LTX_STYLE
from motionmerge.merging.names.minimax_h3 import MINIMAX_H3_SHARDS_STYLE, MINIMAX_H3_STYLE
from motionmerge.merging.names.rules import Names, Order, Templates, numbered
from motionmerge.merging.names.wan import ANIMATE_2_STYLE, WAN, WAN_STYLE
from motionmerge.merging.names.wrappers import (
    PROJECTOR,
    bare_names,
    denoiser_alone,
    with_projector,
)

__all__ = [
    "STYLES",
    "WAN",
    "Spelling",
    "family_of_names",
    "spellings",
    "spellings_for",
    "split_number",
    "styles_for",
]

STYLES: tuple[Names, ...] = (
    WAN_STYLE,
    HUNYUAN_COMFYUI_STYLE,
    HUNYUAN_STYLE,
    HUNYUAN_15_COMFYUI_STYLE,
    HUNYUAN_15_STYLE,
    LTX_STYLE,
    LTX_2_STYLE,
    COSMOS_2_STYLE,
    COSMOS_STYLE,
    COGVIDEOX_COMFYUI_STYLE,
    COGVIDEOX_STYLE,
    MINIMAX_H3_STYLE,
    MINIMAX_H3_SHARDS_STYLE,
    KANDINSKY_5_STYLE,
    ANIMATE_2_STYLE,
)
"""Every way of naming. The first of a family is the one that is written."""


def styles_for(names: Iterable[str]) -> tuple[Names, ...]:
    """Return every way of naming that tensors may follow, that of DynamiCrafter made for them.

    Args:
        names: Of the tensors, without wrappers; those of an image projector have its name in front.
    """
    own = dynamicrafter_style(names)
    return STYLES if own is None else (*STYLES, own)


def family_of_names(names: Iterable[str]) -> str | None:
    """Return the family of a denoiser by the names of its tensors, of diffusers or original.

    Args:
        names: With or without wrappers (`model.diffusion_model.`) and one module (`transformer.`).

    Returns:
        None if no family knows all of them, or if several do.
    """
    split = bare_names(denoiser_alone(names)).values()
    held = set(with_projector(split))
    if not held or len({module for module, _ in split} - {"image_projector"}) > 1:
        return None
    found: dict[str, list[Templates]] = {}
    for style in styles_for(held):
        for templates in (style.written, style.ours):
            if all(templates.find_tensor(name) or style.is_computed(name) for name in held):
                found.setdefault(style.family, []).append(templates)
    if len(found) > 1:  # LTX-2 has all names of LTX, and more
        found = {
            family: fits
            for family, fits in found.items()
            if any(templates.all_occur(held) for templates in fits)
        }
    return next(iter(found)) if len(found) == 1 else None


@dataclass(frozen=True)
class Spelling:
    """One meaning that a layer of the original may have in diffusers.

    Attributes:
        path: Its path in diffusers, flat; that of a fused layer is one name, e.g. `attn_to_qkv`.
        order: The parts of its rows as they follow one another in the original; None where they
            are those of diffusers.
    """

    path: str
    order: Order | None = None

    def rows_in_ours(
        self, num_rows: int, *, head_dim: int | None = None
    ) -> tuple[slice, ...] | None:
        """Return where the rows that diffusers has one behind the other lie in the original layer.

            ours = cat([theirs[rows] for rows in spelling.rows_in_ours(len(theirs))])

        `theirs` is the layer's weight or bias, or `up` of a LoRA for it; `ours` is the same in the
        order of diffusers, the parts of a fused layer one behind the other.

        Args:
            num_rows: How many rows the layer has.
            head_dim: Rows of one head, if this fused layer has q, k and v dealt by head: LoRAs of
                DiffSynth-Studio for MiniMax-H3, and its original shards.

        Returns:
            None if the rows stand in the order of diffusers.

        Raises:
            ShapeError: The rows cannot be cut so.
        """
        if head_dim is not None:
            heads = _equal_parts(num_rows, 3 * head_dim, self.path)
            return tuple(
                slice((3 * head + part) * head_dim, (3 * head + part + 1) * head_dim)
                for part in range(3)
                for head in range(heads)
            )
        if self.order is None:
            return None
        rows = _equal_parts(num_rows, len(self.order), self.path)
        order = self.order
        places = sorted(range(len(order)), key=lambda place: order[place])
        return tuple(slice(place * rows, (place + 1) * rows) for place in places)


def _equal_parts(num_rows: int, divisor: int, path: str) -> int:
    if num_rows % divisor:
        raise ShapeError(
            f"`{path}` has {num_rows} rows, which cannot be cut into equal parts by {divisor}.",
            fix="Use weights for this model; its layers have other sizes.",
        )
    return num_rows // divisor


_NUMBER = re.compile(r"blocks_(\d+)_")


class _Flat:
    """All tables with underscores for dots, as kohya's keys have them."""

    def __init__(self) -> None:
        self._meanings: dict[str, dict[Spelling, None]] = {}
        for names in STYLES:
            for path in (*names.table, *names.also):
                self._add(path, names.ours_of(path), names.orders.get(path))
            for ours in names.homes:  # `blocks.0.norm2` is Wan in diffusers before anything else
                self._add(ours, ours, None)
        self._templates = Templates(self._meanings)

    def _add(self, path: str, ours: str, order: Order | None) -> None:
        # Only where one has a weight and the other a bare parameter is `.weight` in the tables.
        layer, meaning = (_flat(name.removesuffix(".weight")) for name in (path, ours))
        self._meanings.setdefault(layer, {})[Spelling(meaning, order)] = None

    def find(self, flat: str) -> Iterator[Spelling]:
        """Yield what a flat path may mean."""
        if found := self._templates.find(flat):
            template, number = found
            for meaning in self._meanings[template]:
                yield Spelling(numbered(meaning.path, number), meaning.order)


@cache
def _tables() -> _Flat:
    return _Flat()


def _flat(path: str) -> str:
    return path.replace(".", "_")


def spellings(flat: str) -> tuple[Spelling, ...]:
    """Return what a layer may be called in diffusers, the commonest meaning first.

    Args:
        flat: A path of an original, or of diffusers, with underscores for dots, e.g.
            `blocks_7_self_attn_q`.

    Returns:
        Empty if no family has such a path.
    """
    return tuple(_tables().find(flat))


def spellings_for(names: Iterable[str]) -> Callable[[str], tuple[Spelling, ...]]:
    """Return `spellings` for the layers of one model, whose size decides DynamiCrafter's names.

    Args:
        names: Of the model's tensors, with or without wrappers and modules.
    """
    split = bare_names(names).values()
    own = dynamicrafter_style(with_projector(split))
    if own is None:
        return spellings
    found = {
        _flat(path): Spelling(_flat(ours.removeprefix(PROJECTOR)))
        for path, ours in own.table.items()
    }

    def of_model(flat: str) -> tuple[Spelling, ...]:
        return (found[flat],) if flat in found else spellings(flat)

    return of_model


def split_number(flat: str) -> tuple[str, str]:
    """Replace a block's number by `{}`; the number is returned second, empty if there is none."""
    found = _NUMBER.search(flat)
    if found is None:
        return flat, ""
    return f"{flat[: found.start(1)]}{{}}{flat[found.end(1) :]}", found[1]
