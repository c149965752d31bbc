"""`--lora`: a file and how strongly it acts, as people write it in this field.

FILE                  weight 1; with --motion the knob: -motion while noisy, then 1
FILE=0.8              weight 0.8 throughout
FILE=-0.25,1          one weight above the boundary, one below it
FILE=-0.25;1          the same, as Wan2GP writes it
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from motionmerge.cli.show_lora import names_in
from motionmerge.errors import CheckpointError, ConfigError
from motionmerge.io.paths import exists, path_of

if TYPE_CHECKING:
    from motionmerge.sampling.request.experts import WeightedLora

LORA_HELP = (
    "FILE, FILE=WEIGHT, or FILE=NOISY,DETAILS with a weight for each side of --boundary: a LoRA "
    "on the model; repeatable. --motion is the knob of those without a weight. FILE may be "
    "hub:owner/name/file.safetensors. Text behind the last = that is no weight belongs to the "
    "name."
)

_NUMBER = r"\s*[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?\s*"
_WEIGHTS = re.compile(rf"{_NUMBER}(?:[,;]{_NUMBER})*")
_FIX = "Write --lora FILE=0.8, or --lora FILE=NOISY,DETAILS with a weight for each side of the "
_FIX += "boundary, e.g. FILE=-0.25,1."


def weighted_loras(texts: Sequence[str], *, motion: float | None) -> list[WeightedLora]:
    """Read all --lora flags.

    Raises:
        ConfigError: One cannot be read, or --motion is given and has none to turn.
    """
    from motionmerge.sampling.request.experts import WeightedLora

    read = [parse_lora(text) for text in texts]
    if motion is not None and all(weights for _, weights in read):
        raise ConfigError(
            "--motion turns LoRAs without a weight of their own, and every --lora has one.",
            fix="Leave --motion out, or write --lora FILE, which is then -motion while noisy and "
            "1 for the details.",
        )
    knob = (1.0,) if motion is None else (0.0 - motion, 1.0)
    found: dict[str, WeightedLora] = {}
    for file, weights in read:
        noisy, details = (weights or knob)[0], (weights or knob)[-1]
        key = file if file.startswith("hub:") else str(path_of(file).absolute())
        if key in found:
            raise ConfigError(
                f"--lora was given {file} twice.",
                fix="Give it once, with the weight that you want.",
            )
        found[key] = WeightedLora(file, noisy, details)
    return list(found.values())


def parse_lora(text: str) -> tuple[str, tuple[float, ...]]:
    """Read one --lora flag: the file, and no weight, one, or one for each side of the boundary.

    Raises:
        ConfigError: There are too many weights, one is no number, or two files can be meant.
    """
    file, sign, tail = text.rpartition("=")
    if not (sign and file):
        return text, ()
    if not _WEIGHTS.fullmatch(tail):
        if exists(path_of(file)) and not exists(path_of(text)):
            raise ConfigError(
                f"--lora {text} has the weight `{tail}`, which is no number.", fix=_FIX
            )
        return text, ()  # the name itself has a `=`
    if exists(path_of(text)):
        if exists(path_of(file)):
            raise ConfigError(
                f"--lora {text} can mean the file {text} or a weight for the file {file}; both "
                "are there.",
                fix="Rename one of them.",
            )
        return text, ()
    weights = tuple(float(one) for one in re.split("[,;]", tail))
    if len(weights) > 2 or not all(map(math.isfinite, weights)):
        raise ConfigError(
            f"--lora {text} has {len(weights)} weights, or one that is not finite.", fix=_FIX
        )
    return file, weights


def describe_loras(loras: Sequence[WeightedLora], *, boundary: float | None) -> list[str]:
    """Return a line for each LoRA: its weight, or both and where they change."""
    from motionmerge.schedule import PAPER_BOUNDARY

    level = PAPER_BOUNDARY if boundary is None else boundary
    lines = []
    for lora in loras:
        weights = f"weight {lora.noisy:g}"
        if lora.noisy != lora.details:
            weights += f" above noise level {level:g}, then {lora.details:g}"
        lines.append(f"LoRA {Path(lora.file).name}: {weights}")
    return lines


def check_kind(path: Path, *, expects_lora: bool) -> None:
    """Refuse a LoRA where whole weights belong, and whole weights where a LoRA does.

    Raises:
        CheckpointError: Says which flag the file is for.
    """
    from motionmerge.merging.lora.detection import is_lora, lora_matrices

    names = names_in(path)
    looks_like_one = is_lora(names)
    if expects_lora and not looks_like_one:
        example = f"; it has e.g. `{names[0]}`" if names else ""
        raise CheckpointError(
            f"{path} is no LoRA: no tensor of it is a matrix of one, or a difference{example}.",
            fix="Give whole weights as --weights FILE, or as --base FILE with --motion.",
        )
    if looks_like_one and not expects_lora:
        example = (lora_matrices(names) or names)[0]
        raise CheckpointError(
            f"{path} is a LoRA, not the weights of a model: it has e.g. `{example}`.",
            fix="Give it as --lora FILE.",
        )
