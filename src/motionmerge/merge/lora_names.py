"""Which tensor of a model a key of a LoRA file belongs to, in the styles that people publish.

    transformer.blocks.0.attn1.to_q.lora_A.weight            diffusers, peft
    lora_unet_down_blocks_0_attentions_0_..._to_q.lora_down.weight       kohya, LyCORIS
    diffusion_model.blocks.0.self_attn.q.lora_down.weight    Wan and Lightning, original names

A key is a module's path and a part. Paths are compared without prefixes, with underscores for dots
(kohya's have lost them) and in the names of diffusers.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from motionmerge.errors import CheckpointError
from motionmerge.merge.lora_fused import Fusion, parts_of, wholes_of
from motionmerge.merge.original_names import to_diffusers
from motionmerge.merge.sources import MODULES

_ADAPTER = r"(?:\.\w+)?"
_PARTS: tuple[tuple[str, str], ...] = (
    ("down", rf"(?:\.lora_A{_ADAPTER}|[._]lora(?:_linear_layer)?[._]down)\.weight"),
    ("up", rf"(?:\.lora_B{_ADAPTER}|[._]lora(?:_linear_layer)?[._]up)\.weight"),
    ("mid", r"\.lora_mid\.weight"),
    ("alpha", r"\.alpha"),
    ("bias", r"\.(?:diff_b|b_norm)"),
    ("up_bias", rf"\.lora_B{_ADAPTER}\.bias"),
    ("full", r"\.(?:diff|w_norm)"),
    *((part, rf"\.{part}") for part in ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")),
    *((part, rf"\.{part}") for part in ("hada_t1", "hada_t2", "lokr_t2")),
    *((part, rf"\.{part}") for part in ("lokr_w1", "lokr_w1_a", "lokr_w1_b")),
    *((part, rf"\.{part}") for part in ("lokr_w2", "lokr_w2_a", "lokr_w2_b")),
)
_MAGNITUDE = re.compile(r"\.(dora_scale|lora_magnitude_vector)\b")

_WRAPPER = re.compile(
    r"^(base_model\.model\.|model\.diffusion_model\.|diffusion_model\.|lora_unet_|lora_transformer_"
    r"|lycoris_)"
)
_MODULE = re.compile(rf"^({'|'.join(sorted(MODULES, key=len, reverse=True))})\.")
_PARTICULAR = ("transformer_2", "image_projector")

_KEYS = tuple((part, re.compile(rf"^(.+?){tail}$")) for part, tail in _PARTS)


@dataclass
class LoraModule:
    """What a LoRA file holds for one module of the model.

    Attributes:
        path: The module, as the file spells it.
        keys: The file's key of each part: `down`, `up`, `up_bias`, `mid`, `alpha`, `full` and
            `bias` (plain differences), and those of LyCORIS by their own names.
    """

    path: str
    keys: dict[str, str] = field(default_factory=dict)

    def parts(self, *, of_bias: bool) -> dict[str, str]:
        """Give the keys that change the module's bias, or those that change its weight."""
        return {
            part: key
            for part, key in self.keys.items()
            if part != "alpha" and (part in ("bias", "up_bias")) is of_bias
        }


def group_keys(keys: Iterable[str]) -> tuple[list[LoraModule], list[str]]:
    """Sort the keys of a LoRA file into modules; the second list is what belongs to none.

    Raises:
        CheckpointError: It is a DoRA, whose effect is no sum with the weights.
    """
    modules: dict[str, LoraModule] = {}
    unknown = []
    for key in keys:
        if _MAGNITUDE.search(key):
            raise CheckpointError(
                f"`{key}` makes this a DoRA, which rescales the weights: it is no task vector.",
                fix="Merge it with the tool that trained it, and use the difference to the base.",
            )
        for part, pattern in _KEYS:
            if found := pattern.match(key):
                module = modules.setdefault(found[1], LoraModule(found[1]))
                module.keys[part] = key
                break
        else:
            unknown.append(key)
    return list(modules.values()), unknown


class ModelNames:
    """The tensor names of a model, to be found by the module paths of LoRA files.

    Args:
        names: Names of the model's tensors, with or without a module's prefix (`unet.`).
    """

    def __init__(self, names: Iterable[str]) -> None:
        self._weights: dict[str, dict[str, str]] = {}
        self._biases: dict[str, dict[str, str]] = {}
        for name in names:
            unwrapped = _WRAPPER.sub("", name)
            path = _MODULE.sub("", unwrapped)
            denoiser = unwrapped.removesuffix(path)
            index = self._biases if path.endswith(".bias") else self._weights
            flat = _flat(path.removesuffix(".bias").removesuffix(".weight"))
            index.setdefault(flat, {})[denoiser] = name

    def weights(self, path: str) -> list[str]:
        """Find the weight (or bare parameter) of a module, in every denoiser that has it.

        A path that begins with `transformer_2.` or `image_projector.` means that one alone.
        """
        return self.find(path, of_bias=False)

    def find(self, path: str, *, of_bias: bool) -> list[str]:
        """Find the bias of a module, or its weight, like `weights`."""
        for flat in _spellings(path):
            if found := self._of(flat, path, of_bias=of_bias):
                return list(found.values())
        return []

    def find_parts(
        self, path: str, *, of_bias: bool
    ) -> tuple[Fusion, list[tuple[str, ...]]] | None:
        """Find the tensors over which the rows of a fused module are dealt, for every denoiser."""
        for flat in _spellings(path):
            for fusion, parts in parts_of(flat):
                found = [self._of(part, path, of_bias=of_bias) for part in parts]
                denoisers = [d for d in found[0] if all(d in names for names in found)]
                if denoisers:
                    return fusion, [tuple(names[d] for names in found) for d in denoisers]
        return None

    def find_wholes(self, path: str, *, of_bias: bool) -> tuple[Fusion, int, list[str]] | None:
        """Find the fused tensor that a module is a part of, and its number among the parts."""
        for flat in _spellings(path):
            for fusion, number, whole in wholes_of(flat):
                if found := self._of(whole, path, of_bias=of_bias):
                    return fusion, number, list(found.values())
        return None

    def _of(self, flat: str, path: str, *, of_bias: bool) -> dict[str, str]:
        """Give a module's tensor in every denoiser that is meant, by the denoiser's prefix."""
        named = (self._biases if of_bias else self._weights).get(flat, {})
        meant = next((name for name in _PARTICULAR if path.startswith(f"{name}.")), None)
        return {d: name for d, name in named.items() if meant is None or d == f"{meant}."}


def _spellings(path: str) -> Iterator[str]:
    """Give what a path may mean, its prefixes taken away one by one."""
    yield _flat(path)
    unwrapped = _WRAPPER.sub("", path)
    yield _flat(unwrapped)
    yield _flat(_MODULE.sub("", unwrapped))


def _flat(path: str) -> str:
    flat = to_diffusers(path.replace(".", "_").replace("_processor_", "_"))
    return f"{flat}_0" if flat.endswith("_to_out") else flat
