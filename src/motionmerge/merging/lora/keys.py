"""The keys of a LoRA file, sorted into modules: a key is a module's path and a part.

Styles: peft and diffusers (`lora_A`), kohya and LyCORIS (`lora_down`, `hada_`, `lokr_`), plain
differences (`diff`, `diff_b`, and `diff_m` of a block's modulation). What other adapters are made
of is known by name and refused.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from motionmerge.errors import CheckpointError

_ADAPTER = r"(?:\.(?P<adapter>.+))?"
_PARTS: tuple[tuple[str, str], ...] = (
    ("down", rf"(?:\.lora_A|[._]lora(?:_linear_layer)?[._]down){_ADAPTER}\.weight"),
    ("up", rf"(?:\.lora_B|[._]lora(?:_linear_layer)?[._]up){_ADAPTER}\.weight"),
    ("mid", r"\.lora_mid\.weight"),
    ("alpha", r"\.alpha"),
    ("bias", r"\.(?:diff_b|b_norm|bias\.diff)"),  # the last: ComfyUI, of a layer without a weight
    ("up_bias", rf"(?:\.lora_B|[._]lora(?:_linear_layer)?[._]up){_ADAPTER}\.bias"),
    ("full", r"\.(?:diff|w_norm)"),
    ("modulation", r"\.diff_m"),
    *((part, rf"\.{part}") for part in ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")),
    *((part, rf"\.{part}") for part in ("hada_t1", "hada_t2", "lokr_t2")),
    *((part, rf"\.{part}") for part in ("lokr_w1", "lokr_w1_a", "lokr_w1_b")),
    *((part, rf"\.{part}") for part in ("lokr_w2", "lokr_w2_a", "lokr_w2_b")),
)
_KEYS = tuple((part, re.compile(rf"^(?P<path>.+?){tail}$")) for part, tail in _PARTS)

_MAGNITUDE = re.compile(r"\.(dora_scale|lora_magnitude_vector)\b")
_OTHER_KINDS = (
    ("OFT", re.compile(r"\.oft_(?:diag|blocks|[rR])\b")),
    ("BOFT", re.compile(r"\.boft_\w+\b")),
    ("(IA)3", re.compile(r"\.(?:ia3_l|on_input)\b")),
    ("GLoRA", re.compile(r"\.[ab][12]\.weight$|\.glora_\w+\b")),
    ("AdaLoRA", re.compile(r"\.(?:lora_E|ranknum)\b")),
    ("VeRA", re.compile(r"\.vera_\w+\b")),
    ("LoRA of an embedding", re.compile(r"\.lora_embedding_[AB]\b")),
    ("whole weight to set (`set_weight`)", re.compile(r"\.set_weight$")),
    ("LoRA that reshapes its layer (`reshape_weight`)", re.compile(r"\.reshape_weight$")),
)
_FIX_OTHER = "Merge it with the tool that made it, and use the difference to the base."

_TARGETS = {"bias": "bias", "up_bias": "bias", "modulation": "modulation"}
"""By part, the tensor of a module that it changes, if that is not the weight."""


_PLAIN = {"full", "bias", "modulation"}
"""Parts that alpha does not scale."""

_WAYS = (
    re.compile(r"down|up|mid"),
    re.compile(r"full"),
    re.compile(r"hada_\w+"),
    re.compile(r"lokr_\w+"),
)
"""Parts that belong together: a weight is changed by those of one line."""


@dataclass
class LoraModule:
    """The keys of a LoRA file for one module of the model.

    Attributes:
        path: The module, as the file spells it.
        keys: The file's key of each part: `down`, `up`, `up_bias`, `mid`, `alpha`, `full` and
            `bias` and `modulation` (plain differences), and those of LyCORIS by their own names.
    """

    path: str
    keys: dict[str, str] = field(default_factory=dict)

    @property
    def has_its_strength(self) -> bool:
        """Whether nothing else says how strong it is: it has an alpha, or nothing to be scaled."""
        return "alpha" in self.keys or self.keys.keys() <= _PLAIN

    def parts(self, target: str) -> dict[str, str]:
        """Return the keys that change the module's `weight`, its `bias`, or its `modulation`."""
        return {
            part: key
            for part, key in self.keys.items()
            if part != "alpha" and _TARGETS.get(part, "weight") == target
        }

    def targets(self) -> list[str]:
        """List what the file changes of the module."""
        found = (_TARGETS.get(part, "weight") for part in self.keys if part != "alpha")
        return list(dict.fromkeys(found))


@dataclass(frozen=True, kw_only=True)
class LoraKeys:
    """The keys of a LoRA file.

    Attributes:
        modules: What it holds by module.
        whole: Keys of whole weights and biases, which are no differences.
        unknown: Keys that are nothing known.
        adapters: The names of the adapters in it; most files name none.
        unused_strengths: Keys of alpha that are nobody's: the matrices of their layers were taken
            out, and all other layers have an alpha of their own.
    """

    modules: tuple[LoraModule, ...]
    whole: tuple[str, ...]
    unknown: tuple[str, ...]
    adapters: tuple[str, ...] = ()
    unused_strengths: tuple[str, ...] = ()


def group_keys(keys: Iterable[str]) -> LoraKeys:
    """Sort the keys of a LoRA file into modules.

    Raises:
        CheckpointError: It is another kind of adapter, such as DoRA, whose effect is no sum with
            the weights; it holds several adapters; or one part of a module has two keys.
    """
    modules: dict[str, LoraModule] = {}
    adapters: dict[str | None, str] = {}
    rest = []
    for key in keys:
        _refuse_other_kinds(key)
        for part, pattern in _KEYS:
            if found := pattern.match(key):
                module = modules.setdefault(found["path"], LoraModule(found["path"]))
                if "adapter" in pattern.groupindex:
                    adapters.setdefault(found["adapter"], key)
                module.keys.setdefault(part, key)
                if module.keys[part] != key and len(adapters) < 2:
                    raise clash(module.keys[part], key, what=f"`{module.path}`")
                break
        else:
            rest.append(key)
    if len(adapters) > 1:
        raise _several_adapters(adapters)
    for module in modules.values():
        _refuse_several_ways(module)
    empty = [path for path, module in modules.items() if module.keys.keys() == {"alpha"}]
    alphas = [modules.pop(path).keys["alpha"] for path in empty]
    _refuse_unknown_parts(modules, [*rest, *alphas])
    # Where a layer has no alpha, one of these may be its own under another spelling.
    if not all(module.has_its_strength for module in modules.values()):
        rest, alphas = [*rest, *alphas], []
    whole = tuple(key for key in rest if key.endswith((".weight", ".bias")))
    unknown = tuple(key for key in rest if key not in set(whole))
    names = tuple(name for name in adapters if name is not None)
    return LoraKeys(
        modules=tuple(modules.values()),
        whole=whole,
        unknown=unknown,
        adapters=names,
        unused_strengths=tuple(alphas),
    )


def clash(first: str, second: str, *, what: str) -> CheckpointError:
    """Make the error for two keys of a LoRA file that mean the same tensor."""
    return CheckpointError(
        f"Two keys of the LoRA file mean {what}: `{first}` and `{second}`.",
        fix="Save the file again with each layer once; both would be added up.",
    )


def _refuse_several_ways(module: LoraModule) -> None:
    """Refuse matrices of several kinds for one weight, and a matrix beside its own factors.

    Raises:
        CheckpointError: Programs that load such a file take one of them, and not all the same.
    """
    parts = module.parts("weight")
    ways = [[key, parts[f"{part}_a"]] for part, key in parts.items() if f"{part}_a" in parts]
    ways += [[key for part, key in parts.items() if way.fullmatch(part)] for way in _WAYS]
    ways = [keys for keys in ways if keys]
    if len(ways) > 1:
        raise clash(ways[0][0], ways[-1][-1], what=f"the weight of `{module.path}`")


def _refuse_other_kinds(key: str) -> None:
    if _MAGNITUDE.search(key):
        raise CheckpointError(
            f"`{key}` makes this a DoRA, which rescales the weights: it is no task vector.",
            fix=_FIX_OTHER,
        )
    for kind, pattern in _OTHER_KINDS:
        if pattern.search(key):
            raise CheckpointError(f"`{key}` is of a {kind}, which is not read.", fix=_FIX_OTHER)


def _several_adapters(adapters: dict[str | None, str]) -> CheckpointError:
    named = [name for name in adapters if name is not None]
    listed = ", ".join(
        f"`{name}` (`{key}`)" if name is not None else f"one without a name (`{key}`)"
        for name, key in adapters.items()
    )
    return CheckpointError(
        f"The file holds several adapters: {listed}.",
        fix="Save one of them alone, e.g. with peft: "
        f"`model.save_pretrained(folder, selected_adapters=['{named[0]}'])`.",
    )


def _refuse_unknown_parts(modules: Mapping[str, LoraModule], keys: Iterable[str]) -> None:
    """Refuse a part that nothing is known about of a module that has others.

    Left out, it could change the strength of the others.
    """
    layers = {path for path, module in modules.items() if module.keys.keys() != {"modulation"}}
    for key in keys:
        stems = [key[: found.start()] for found in re.finditer(r"\.", key)]
        owner = next((stem for stem in reversed(stems) if stem in layers), None)
        if owner is not None and key.removeprefix(owner) not in (".weight", ".bias"):
            raise CheckpointError(
                f"`{key}` is a part of the LoRA of `{owner}` about which nothing is known.",
                fix=_FIX_OTHER,
            )
