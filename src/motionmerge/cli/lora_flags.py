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

from motionmerge.errors import ConfigError
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
