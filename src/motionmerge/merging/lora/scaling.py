"""How strong a layer of a LoRA is: alpha / rank, from the file itself or from what is beside it.

The first of these that knows counts: the layer's alpha in the file, the settings that diffusers
writes into the header, plain keys of the header, `adapter_config.json`. If none does, it is 1.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from motionmerge.errors import CheckpointError, ConfigError
from motionmerge.merging.lora.names import component_of
from motionmerge.merging.lora.settings import (
    ByComponent,
    LoraSettings,
    modules_of_header,
    settings_of_file,
    settings_of_header,
)
from motionmerge.patterns import compile_pattern

ALPHA_KEY = "the file's alpha"
NO_ALPHA = "no alpha"


@dataclass(frozen=True)
class Strength:
    """The factor of a layer's product.

    Attributes:
        factor: Alpha / rank.
        alpha: Alpha; None if nothing knows it.
        origin: Where alpha stands, in words.
        rank: The rank that it is divided by; None if nothing knows it.
    """

    factor: float
    alpha: float | None
    origin: str
    rank: int | None = None


@dataclass(frozen=True)
class LoraScaling:
    """What stands beside the tensors of a LoRA file, above all about alpha.

    Attributes:
        settings: All of `adapter_config.json`; empty if there is none.
        known: The settings, those that count most first.
        modules: The modules of a pipeline that it is for; empty where nothing says so.
    """

    settings: Mapping[str, Any] = field(default_factory=dict)
    known: Sequence[ByComponent] = ()
    modules: tuple[str, ...] = ()

    @classmethod
    def beside(cls, path: Path, metadata: Mapping[str, str]) -> LoraScaling:
        """Read the header of a file, and the `adapter_config.json` of peft.

        Raises:
            CheckpointError: They are damaged, contradict each other, or change more than alpha.
        """
        header = settings_of_header(metadata, where=str(path))
        modules = modules_of_header(metadata, where=str(path))
        raw, own = settings_of_file(path)
        known = [*header, own] if own else header
        for settings in known:
            for one in settings.values():
                _check_patterns(one)
        return cls(raw, known, modules)

    def check_kind(self, keys: Iterable[str], *, name: str) -> None:
        """Refuse matrices of another kind than `adapter_config.json` says, as peft does.

        Raises:
            CheckpointError: E.g. `peft_type` is LOHA beside `lora_A`.
        """
        kind = self.settings.get("peft_type")
        marks = {"LORA": "lora_", "LOHA": "hada_", "LOKR": "lokr_"}
        for key in keys if kind in marks else ():
            found = next((other for other, mark in marks.items() if f".{mark}" in key), kind)
            if found != kind:
                raise CheckpointError(
                    f"`peft_type` is {kind} in the `adapter_config.json` of `{name}`, but "
                    f"`{key[:200]}` is part of a {found}.",
                    fix="Put the file's own `adapter_config.json` beside it.",
                )

    def strength(self, path: str, *, layer: str, rank: int | None, alpha: float | None) -> Strength:
        """Return alpha / rank of a module; 1 if alpha or the rank is unknown.

        Args:
            path: The module as the file spells it; its beginning names the part of the pipeline.
            layer: The module as the model spells it, without wrappers, for patterns.
            rank: Rank of its factors, if they tell.
            alpha: Alpha as the file has it, which nothing overrules.

        Raises:
            CheckpointError: A pattern is none, several settings may be meant, or the rank that
                they give is not that of the factors.
        """
        if alpha is not None:
            return Strength(1.0 if rank is None else alpha / rank, alpha, ALPHA_KEY, rank)
        for settings in self.known:
            own = _of_component(settings, component_of(path), path)
            if own is not None:
                given = _special(own.alpha_pattern, own.alpha, layer, own.origin)
                said = _special(own.rank_pattern, own.rank, layer, own.origin)
                if given is not None and rank is not None and said not in (None, rank):
                    raise CheckpointError(
                        f"`{path}` has rank {rank}, but {own.origin} says {said:g}, so its "
                        "strength, alpha / rank, is not known.",
                        fix="Correct `r` or `rank_pattern` there, or use the LoRA's own settings.",
                    )
                ranked = rank or said
                if given is not None and ranked is not None:
                    root = math.sqrt(ranked) if own.rank_stabilised else ranked
                    return Strength(given / root, given, own.origin, int(ranked))
        return Strength(1.0, None, NO_ALPHA, rank)


def _of_component(settings: ByComponent, component: str, path: str) -> LoraSettings | None:
    """Choose the settings of a part of the pipeline; of a path that names none, the only ones."""
    if component in settings:
        return settings[component]
    if "" in settings or component:
        return settings.get("")
    several = list(settings.values())
    if any(other != several[0] for other in several):
        raise CheckpointError(
            f"`{path}` of the LoRA names no part of the pipeline, and there are different settings "
            f"for {', '.join(settings)}.",
            fix="Save the LoRA with the part's name in front of its keys (`transformer.`).",
        )
    return several[0] if several else None


def _check_patterns(settings: LoraSettings) -> None:
    """Refuse a pattern that is none, as peft does, also where no layer's strength depends on it."""
    for pattern in (*settings.alpha_pattern, *settings.rank_pattern):
        try:
            compile_pattern(as_peft(pattern))
        except ConfigError as error:
            raise CheckpointError(
                f"The pattern {pattern[:100]!r} of {settings.origin} cannot be used: "
                f"{error.message}",
                fix="Write the layers' names in `alpha_pattern` and `rank_pattern`.",
            ) from error


def _special(
    patterns: Mapping[str, float], default: float | None, layer: str, origin: str
) -> float | None:
    try:
        found = (pattern for pattern in patterns if compile_pattern(as_peft(pattern))(layer))
        return next((patterns[pattern] for pattern in found), default)
    except ConfigError as error:
        raise CheckpointError(
            f"The patterns of {origin} cannot be used for `{layer}`: {error.message}",
            fix="Write the layers' names in `alpha_pattern` and `rank_pattern`.",
        ) from error


def as_peft(pattern: str) -> str:
    """Return the expression that peft matches with the path of a layer."""
    return rf"\A(.*\.)?({pattern})$"
