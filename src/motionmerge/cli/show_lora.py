"""What `motionmerge show` says of a LoRA: its strength and where that stands, and what it fits."""

from __future__ import annotations

import re
import sys
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from motionmerge.cli.printing import aligned, harmless
from motionmerge.errors import CheckpointError, ConfigError, MotionMergeError

_SHOWN = 5
"""Names of layers in a list that may be long."""

_HEADINGS = ("group", "layers", "rank", "alpha", "scale", "alpha stands in", "change")


def names_in(path: Path) -> list[str]:
    """List the tensors of weights; none of a pipeline's folder, which is no LoRA.

    Raises:
        CheckpointError: It cannot be read.
    """
    from motionmerge.io.weights import open_weights
    from motionmerge.merging.inputs.sources import module_folders

    if module_folders(path):
        return []
    with open_weights(path) as reader:
        return list(reader.keys())


def describe(path: Path, *, base: Path | None) -> dict[str, Any]:
    """Describe a LoRA as plain values: groups, and with a base what it reaches and misses of it.

    Raises:
        ConfigError: There is a base, and the file is no LoRA.
        CheckpointError, ShapeError: The base cannot be read, or does not fit.
    """
    from motionmerge.merging.inputs.resolvers import resolve
    from motionmerge.merging.inputs.sources import OpenInputs, Source
    from motionmerge.merging.lora.detection import is_lora
    from motionmerge.merging.lora.report import describe_lora

    if base is None:
        return asdict(describe_lora(path))
    source = Source("base", resolve(str(base)))
    with OpenInputs([source]) as opened:
        names = opened.names(source)
        if is_lora(names):
            raise CheckpointError(
                f"--base {base} is a LoRA itself.", fix="Give the weights that the LoRA is for."
            )
        shapes = {name: opened.shape(source, name) for name in names}
        found = describe_lora(path, shapes, read_base=lambda name: opened.value(source, name))
    reached = set(found.reached or ())
    matrices = [name for name, shape in shapes.items() if len(shape) > 1]
    missed = Counter(_template(name) for name in matrices if name not in reached)
    return {**asdict(found), "matrices_of_base": len(matrices), "missed": dict(missed)}


def check_base(base: Path | None) -> None:
    """Refuse --base for what is no LoRA.

    Raises:
        ConfigError: There is one.
    """
    if base is not None:
        raise ConfigError(
            "--base is what a LoRA is for, and this is none.",
            fix="Leave --base out; `motionmerge compare` compares whole weights.",
        )


def described(path: Path, *, base: Path | None) -> dict[str, Any]:
    """Describe a LoRA; one that cannot be used says why, and is shown all the same."""
    try:
        return describe(path, base=base)
    except MotionMergeError as error:
        if base is not None:
            raise
        return {"cannot_be_used": error.message}


def print_note(found: Mapping[str, Any]) -> None:
    """Print the description as a table of groups and lines; without lines around when piped."""
    if "cannot_be_used" in found:
        print(f"a LoRA that cannot be used: {harmless(found['cannot_be_used'])}")
        return
    print(f"a LoRA, names as {', '.join(found['styles'])}")
    if found["adapters"]:
        print(f"adapters: {harmless(', '.join(found['adapters']))}")
    if found["modules"]:
        print(f"for {', '.join(found['modules'])}, as its header says")
    rows = [_row(name, group) for name, group in found["groups"].items()]
    _print_table(rows)
    if found["reached"] is not None:
        weights = f"{len(found['reached']):,} tensors of the base"
        matrices = f"{found['matrices_of_base']:,} matrices"
        missed = [f"{name} ({count})" for name, count in found["missed"].items()]
        if missed:
            print(f"reaches {weights}; of its {matrices} it misses:\n  {_some(missed)}")
        else:
            print(f"reaches {weights}, all of its {matrices} among them")
    if found["strangers"]:
        print(f"{len(found['strangers']):,} of its layers or keys go nowhere:")
        for name, why in list(found["strangers"].items())[:_SHOWN]:
            print(f"  {harmless(name)}: {harmless(why)}")
        if len(found["strangers"]) > _SHOWN:
            print(f"  ... {len(found['strangers']) - _SHOWN} more")
    if found["unused_strengths"]:
        print(f"{found['unused_strengths']:,} of its alphas are of layers that it does not hold")
    for warning in found["warnings"]:
        print(f"Warning: {warning}")


def _row(name: str, group: Mapping[str, Any]) -> tuple[str, ...]:
    change = group["change"]
    return (
        name,
        f"{group['layers']:,}",
        _range(group["ranks"]),
        _range(group["alphas"]),
        _range(group["scales"]),
        harmless(", ".join(group["origins"])),
        "" if change is None else f"{change:.2%} of the weights",
    )


def _print_table(rows: list[tuple[str, ...]]) -> None:
    if sys.stdout.isatty():
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text

        table = Table(*_HEADINGS)
        for row in rows:
            table.add_row(*map(Text, row))
        Console().print(table)
        return
    print("\n".join(aligned([_HEADINGS, *rows], numbers=False)))


def _range(values: tuple[float, float] | None) -> str:
    if values is None:
        return "unknown"
    low, high = values
    return f"{low:g}" if low == high else f"{low:g} to {high:g}"


def _template(name: str) -> str:
    """Return a tensor's name with `*` for numbers: one for all blocks."""
    return re.sub(r"(?<=\.)\d+(?=\.|$)", "*", name)


def _some(names: list[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(map(harmless, names[:_SHOWN])) + more
