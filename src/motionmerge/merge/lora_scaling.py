"""What stands beside a LoRA file about its strength: alpha, for all layers or for some."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from motionmerge.errors import CheckpointError

_METADATA_KEY = "lora_adapter_metadata"
_CONFIG_FILE = "adapter_config.json"


@dataclass(frozen=True)
class LoraScaling:
    """What the settings beside a LoRA file say about alpha, where the file has no alpha keys.

    Attributes:
        settings: Those of peft: `lora_alpha` (`alpha` of LoHa and LoKr), `alpha_pattern`, `r`,
            `use_rslora`; empty if nothing is known.
    """

    settings: Mapping[str, Any]

    @classmethod
    def beside(cls, path: Path, metadata: Mapping[str, str]) -> LoraScaling:
        """Read the header of a file that diffusers saved, or the `adapter_config.json` of peft.

        Raises:
            CheckpointError: They are no JSON.
        """
        config = (path if path.is_dir() else path.parent) / _CONFIG_FILE
        try:
            if _METADATA_KEY in metadata:
                found = json.loads(metadata[_METADATA_KEY])
                return cls({key.partition(".")[2] or key: found[key] for key in found})
            if config.is_file() and (path.is_dir() or path.stem == "adapter_model"):
                return cls(json.loads(config.read_text(encoding="utf-8")))
        except (ValueError, AttributeError, OSError) as error:
            raise CheckpointError(
                f"The LoRA settings of {path} cannot be read: {error}.",
                fix="Save the LoRA again, or remove its settings and scale it yourself.",
            ) from error
        return cls({})

    def factor(self, path: str, *, rank: int | None, alpha: float | None) -> float:
        """Give alpha / rank of a module; 1 if alpha or the rank is unknown.

        Args:
            path: The module.
            rank: Rank of its factors, if they tell.
            alpha: Alpha as the file has it, which the settings do not overrule.
        """
        if alpha is not None:
            return 1.0 if rank is None else alpha / rank
        given = self.settings.get("lora_alpha", self.settings.get("alpha"))
        for pattern, value in (self.settings.get("alpha_pattern") or {}).items():
            if re.match(rf"(.*\.)?({pattern})$", path):
                given = value
        rank = rank or self.settings.get("r")
        if given is None or rank is None:
            return 1.0
        return float(given) / (math.sqrt(rank) if self.settings.get("use_rslora") else rank)
