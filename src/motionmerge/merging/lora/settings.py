"""What stands beside a LoRA's tensors: about their strength, and for which modules they are.

    lora_adapter_metadata   in the header, of diffusers: settings of each part of a pipeline
    transformer.lora_alpha  in the header, plain; also without the part's name
    adapter_config.json     beside `adapter_model.*`, or beside a LoRA that lies alone, of peft
    motionmerge.modules     in the header of exports: the modules of a pipeline that it is for

Settings that change what a LoRA does and are not carried out here are refused by name.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from motionmerge.errors import CheckpointError
from motionmerge.io.first_bytes import PICKLE_SUFFIXES
from motionmerge.io.json_file import read_json
from motionmerge.merging.inputs.sources import MODULES
from motionmerge.merging.lora.names import is_other_component

METADATA_KEY = "lora_adapter_metadata"
MODULES_KEY = "motionmerge.modules"
CONFIG_FILE = "adapter_config.json"

_KINDS = ("LORA", "LOHA", "LOKR")
_STARTS = ("gaussian", "eva", "orthogonal", "mica", "lycoris")
"""Starts of the training that leave the model's weights alone."""

_HARMLESS = frozenset(
    {"auto_mapping", "base_model_name_or_path", "bias", "corda_config", "decompose_both",
     "decompose_factor", "eva_config", "exclude_modules", "inference_mode", "init_weights",
     "layers_pattern", "layers_to_transform", "loftq_config", "lora_dropout", "lora_ga_config",
     "megatron_config", "megatron_core", "module_dropout", "modules_to_save", "peft_version",
     "qalora_group_size", "rank_dropout", "rank_dropout_scale", "revision", "runtime_config",
     "target_modules", "task_type", "use_effective_conv2d", "velora_config"}
)  # fmt: skip
"""Settings for training and for finding layers, or that show in the keys. `fan_in_fan_out` counts
for GPT-2's own layers only, of which no video model has any."""
_CARRIED_OUT = frozenset(
    {"alpha", "alpha_pattern", "fan_in_fan_out", "init_lora_weights", "lora_alpha", "lora_bias",
     "peft_type", "r", "rank_pattern", "use_rslora"}
)  # fmt: skip

_ALPHA_OF_PEFT = 8
"""The default of peft's settings."""

_PLAIN_ALPHAS = ("lora_alpha", "network_alpha", "alpha", "ss_network_alpha")
_PLAIN_RANKS = ("r", "rank", "lora_rank", "network_dim", "ss_network_dim")
_PLAIN = (*_PLAIN_ALPHAS, *_PLAIN_RANKS, "alpha_pattern", "rank_pattern", "use_rslora")
_NOTHING = ("", "none", "null", "nan")


@dataclass(frozen=True, kw_only=True)
class LoraSettings:
    """The strength of the layers that have no alpha of their own.

    Attributes:
        origin: Where it stands, in words.
        alpha: Alpha of all layers; None: not known.
        rank: Rank of all layers, for those whose matrices do not tell.
        alpha_pattern, rank_pattern: Those of some layers.
        rank_stabilised: Divide by the root of the rank.
    """

    origin: str = ""
    alpha: float | None = None
    rank: float | None = None
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    rank_pattern: Mapping[str, float] = field(default_factory=dict)
    rank_stabilised: bool = False


ByComponent = Mapping[str, LoraSettings]
"""Settings by part of the pipeline (`transformer`); those without a name are for every part."""


def settings_of_header(metadata: Mapping[str, str], *, where: str) -> list[ByComponent]:
    """Read the settings in a header, those that count most first.

    Raises:
        CheckpointError: They are damaged, contradict each other, or change more than the strength.
    """
    found: list[ByComponent] = []
    if given := settings_in_header(metadata, where=where):
        split: dict[str, dict[str, Any]] = {}
        for key, value in given.items():
            component, _, name = key.rpartition(".")
            if not is_other_component(f"{component}."):
                known = component if component in MODULES else ""
                split.setdefault(known, {})[name] = value
        found.append(_checked(split, METADATA_KEY, where))
    plain = _plain(metadata, where)
    return [*found, plain] if plain else found


def settings_in_header(metadata: Mapping[str, str], *, where: str) -> Mapping[str, Any]:
    """Return what diffusers wrote into a header, unchecked; empty if it is not there.

    Raises:
        CheckpointError: It is damaged.
    """
    if METADATA_KEY not in metadata:
        return {}
    return _mapping(_json(metadata[METADATA_KEY], where), where)


def modules_of_header(metadata: Mapping[str, str], *, where: str) -> tuple[str, ...]:
    """Return the modules that a header says the LoRA is for; empty if it says nothing.

    Raises:
        CheckpointError: One is no module of a pipeline that is merged.
    """
    found = tuple(filter(None, metadata.get(MODULES_KEY, "").split(",")))
    if unknown := [module for module in found if module not in MODULES]:
        raise CheckpointError(
            f"The LoRA {where} is for `{unknown[0][:100]}`, as `{MODULES_KEY}` in its header says; "
            f"expected some of {', '.join(MODULES)}.",
            fix="Export it again, or save it without this key of the header.",
        )
    return found


def settings_of_file(path: Path) -> tuple[Mapping[str, Any], ByComponent]:
    """Read the `adapter_config.json` beside a LoRA of peft; empty if there is none.

    Returns:
        Everything in it, and the settings.

    Raises:
        CheckpointError: It is damaged, or changes more than the strength.
    """
    config = (path if path.is_dir() else path.parent) / CONFIG_FILE
    if not config.is_file() or not _is_about(config, path):
        return {}, {}
    given = read_json(config)
    return given, _checked({"": given}, CONFIG_FILE, str(config))


def _is_about(config: Path, path: Path) -> bool:
    """Check whether a configuration is a LoRA's own; a renamed LoRA that lies alone has it too."""
    if path.is_dir() or path.stem == "adapter_model":
        return True
    suffixes = {".safetensors", *PICKLE_SUFFIXES}
    return [one for one in config.parent.iterdir() if one.suffix.lower() in suffixes] == [path]


def _json(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise _unreadable(where, str(error)) from error


def _mapping(found: Any, where: str) -> Mapping[str, Any]:
    if not isinstance(found, dict):
        raise _unreadable(where, f"they are a {type(found).__name__}, not settings by name")
    return found


def _checked(
    split: Mapping[str, Mapping[str, Any]], origin: str, where: str
) -> dict[str, LoraSettings]:
    """Read the settings of each part of a pipeline, as peft writes them."""
    found = {}
    for component, given in split.items():
        _refuse_other_effects(given, where)
        alpha = given.get("lora_alpha", given.get("alpha", _ALPHA_OF_PEFT))
        read = {**given, "lora_alpha": _number(alpha, "lora_alpha", where)}
        found[component] = _settings(read, origin, where)
    return found


def _settings(given: Mapping[str, Any], origin: str, where: str) -> LoraSettings:
    patterns: dict[str, dict[str, float]] = {}
    for name in ("alpha_pattern", "rank_pattern"):
        pattern = given.get(name) or {}
        if not isinstance(pattern, dict):
            raise _unreadable(where, f"`{name}` is a {type(pattern).__name__}")
        patterns[name] = {key: _number(pattern[key], f"{name}[{key}]", where) for key in pattern}
    return LoraSettings(
        origin=origin,
        alpha=given.get("lora_alpha"),
        rank=None if given.get("r") is None else _rank(given["r"], where),
        alpha_pattern=patterns["alpha_pattern"],
        rank_pattern={key: _rank(value, where) for key, value in patterns["rank_pattern"].items()},
        rank_stabilised=_switch(given.get("use_rslora"), "use_rslora", where),
    )


def _plain(metadata: Mapping[str, str], where: str) -> dict[str, LoraSettings]:
    """Read plain keys of a header, e.g. `lora_alpha` or `transformer.lora_alpha`."""
    split: dict[str, dict[str, str]] = {}
    for key, value in metadata.items():
        component, _, name = key.rpartition(".")
        is_given = isinstance(value, str) and value.strip().lower() not in _NOTHING
        if name in _PLAIN and component in ("", *MODULES) and is_given:
            split.setdefault(component, {})[name] = value
    found = {}
    shared = {name: value for name, value in split.get("", {}).items() if name not in _PLAIN_ALPHAS}
    for component, own in split.items():
        # What has no alpha of its own, only a rank, has that of all parts.
        has_alpha = any(name in own for name in _PLAIN_ALPHAS)
        given = {**(shared if has_alpha else split.get("", {})), **own}
        prefix = f"{component}." if component else ""
        alphas = {
            name: _number(given[name], name, where) for name in _PLAIN_ALPHAS if name in given
        }
        if len(set(alphas.values())) > 1:
            listed = ", ".join(f"`{prefix}{name}` {value:g}" for name, value in alphas.items())
            raise CheckpointError(
                f"The header of {where} has several alphas: {listed}.",
                fix="Save the LoRA with one of them, or with an alpha for each layer.",
            )
        read: dict[str, Any] = {
            name: _json(given[name], where)
            for name in ("alpha_pattern", "rank_pattern")
            if name in given
        }
        read |= {"lora_alpha": next(iter(alphas.values()), None)}
        read |= {"r": _plain_rank(given)}
        read |= {"use_rslora": given.get("use_rslora")}
        names = ", ".join(f"`{prefix}{name}`" for name in alphas or given)
        found[component] = _settings(read, f"{names} in the header", where)
    return found


def _plain_rank(given: Mapping[str, str]) -> str | None:
    """Return the rank in a plain header; None where it has none, or several.

    Kohya's scripts write `Dynamic` where the layers differ.
    """
    ranks = {given[name].strip() for name in _PLAIN_RANKS if name in given}
    ranks = {rank for rank in ranks if rank.isdecimal() and int(rank[:9]) > 0}
    return ranks.pop() if len(ranks) == 1 else None


def _refuse_other_effects(given: Mapping[str, Any], where: str) -> None:
    """Refuse settings by which a LoRA is more than the sum of its matrices with the weights.

    Raises:
        CheckpointError: Such a setting is on.
    """
    kind = given.get("peft_type")
    if kind is not None and kind not in _KINDS:
        raise _other_effect(where, "peft_type", kind)
    start = given.get("init_lora_weights")
    if isinstance(start, str) and start.lower() not in _STARTS and start.lower() != "true":
        # peft takes a part of the weights away before it adds such a LoRA to them.
        raise CheckpointError(
            f"`init_lora_weights` is `{start[:100]}` in {where}: its training changed the model's "
            "own weights as well.",
            fix="Save it as a plain LoRA with peft: `model.save_pretrained(folder, "
            "path_initial_model_for_weight_conversion=...)`.",
        )
    for name, value in given.items():
        is_off = value is None or value is False or value in ([], {}, "")
        if name not in _HARMLESS | _CARRIED_OUT and not is_off:
            raise _other_effect(where, name, value)


def _other_effect(where: str, name: str, value: Any) -> CheckpointError:
    return CheckpointError(
        f"`{name}` is {str(value)[:100]!r} in {where}, by which the LoRA may be more than the sum "
        "of its matrices with the weights.",
        fix="Merge it with peft, and use the difference to the base; or take the setting out if it "
        "is for training only.",
    )


def _number(value: Any, name: str, where: str) -> float:
    """Read a number, also one in a text, as headers have it."""
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number):
        raise _unreadable(where, f"`{name[:100]}` is {str(value)[:100]!r}, not a number")
    return number


def _rank(value: Any, where: str) -> float:
    rank = _number(value, "rank", where)
    if rank < 1:
        raise _unreadable(where, f"a rank is {rank:g}")
    return rank


def _switch(value: Any, name: str, where: str) -> bool:
    text = str(value).strip().lower()
    if text not in ("true", "false", "none", "1", "0"):
        raise _unreadable(where, f"`{name}` is {str(value)[:100]!r}, not true or false")
    return text in ("true", "1")


def _unreadable(where: str, why: str) -> CheckpointError:
    return CheckpointError(
        f"The LoRA settings of {where} cannot be read: {why}.",
        fix="Save the LoRA again, or remove its settings and scale it yourself.",
    )
