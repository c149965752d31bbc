"""Which tensor of a model a module of a LoRA file belongs to, in the styles that people publish.

    transformer.blocks.0.attn1.to_q          diffusers, peft
    lora_unet_down_blocks_0_..._to_q         kohya, LyCORIS
    diffusion_model.blocks.0.self_attn.q     Wan and Lightning, original names

Paths are compared without wrappers, with underscores for dots (kohya's have lost them) and in the
names of diffusers. A spelling that is nearer to the file's own is tried first, so that a model
whose own names begin like a wrapper (`model.`) keeps them.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from motionmerge.errors import CheckpointError
from motionmerge.merging.inputs.sources import MODULES
from motionmerge.merging.lora.fused import Fusion, parts_of, wholes_of
from motionmerge.merging.names.minimax_h3 import MINIMAX_H3_SHARDS_STYLE
from motionmerge.merging.names.original import Spelling, spellings_for, split_number
from motionmerge.merging.names.wrappers import BETWEEN, FRONT, bare_names

_BETWEEN_FLAT = re.compile(rf"_(?:{'|'.join(BETWEEN)})(?=_|$)")
_WRAPPER = re.compile(
    rf"^(?:(?:{'|'.join(map(re.escape, FRONT))})\."
    r"|lora_unet__?|lora_transformer_|lycoris_|Hunyuan_video_I2V_lora_)"
)
_MODULE = re.compile(rf"^(?:{'|'.join(sorted(MODULES, key=len, reverse=True))})\.")
_PARTICULAR = ("transformer_2.", "image_projector.")
_FIRST_OF_TWO = re.compile(r"^(?:pipe\.)?dit\.")
_SECOND_OF_TWO = re.compile(r"^(?:pipe\.)?dit2\.")
"""What DiffSynth-Studio calls the denoisers of a pair."""
_OTHER_COMPONENT = re.compile(
    r"^(?:base_model\.model\.)?(text_encoder(?:_\d)?|text_encoders|vae|first_stage_model"
    r"|conditioner|cond_stage_model)[._]|^lora_(te\d?)_"
)


@dataclass(frozen=True)
class Found:
    """The tensors that a path of a LoRA file means.

    Attributes:
        path: The path without what wraps it, as the spelling has it that fits the model.
        names: The tensor in every denoiser that is meant.
        spelling: The name that fits; it knows whether the rows stand in another order.
    """

    path: str
    names: tuple[str, ...]
    spelling: Spelling


@dataclass(frozen=True)
class FoundParts:
    """The tensors over which the rows of a fused module are dealt.

    Attributes:
        path, spelling: See `Found`.
        fusion: What is fused.
        denoisers: For every denoiser that is meant, the tensor of each part.
    """

    path: str
    fusion: Fusion
    denoisers: tuple[tuple[str, ...], ...]
    spelling: Spelling


@dataclass(frozen=True)
class FoundWhole:
    """The fused tensors that a module is a part of.

    Attributes:
        path: See `Found`.
        fusion: What is fused.
        number: Which of the parts it is.
        names: The fused tensor in every denoiser that is meant.
    """

    path: str
    fusion: Fusion
    number: int
    names: tuple[str, ...]


class ModelNames:
    """The tensor names of a model, to be found by the module paths of a LoRA file.

    Args:
        names: Names of the model's tensors, with or without a module's prefix (`unet.`).
        paths: The paths of the file. If one begins with `transformer_2.` or `image_projector.`,
            one that begins with another module's name means that module alone.
        only: The modules that the file is for; empty: it does not say. A file for several modules
            means each by its own name. A model that is one denoiser has no modules.

    Raises:
        CheckpointError: The model has modules, and none of these.
    """

    def __init__(
        self, names: Iterable[str], paths: Iterable[str] = (), *, only: Sequence[str] = ()
    ) -> None:
        self._weights: dict[str, dict[str, list[tuple[int, str, str]]]] = {}
        self._biases: dict[str, dict[str, list[tuple[int, str, str]]]] = {}
        self._only = frozenset(f"{module}." for module in only)
        paths = list(paths)
        self._is_of_pair = any(map(_SECOND_OF_TWO.match, paths))
        self._exact = (
            len(only) > 1
            or self._is_of_pair
            or any(module in _PARTICULAR for path in paths for _, module, _ in _unwrapped(path))
        )
        split = bare_names(names)
        self._spellings = spellings_for(split)
        owners = {name: f"{module}." if module else "" for name, (module, _) in split.items()}
        for name, owner in owners.items():
            self._add(name, owner)
        held = dict.fromkeys(owners.values())
        if only and "" not in held and not self._only & held.keys():
            raise _no_such_module(only, [module.rstrip(".") for module in held])

    def _add(self, name: str, module: str) -> None:
        index = self._biases if name.endswith(".bias") else self._weights
        unwrapped = list(_unwrapped(name.removesuffix(".bias").removesuffix(".weight")))
        for level, owner, path in unwrapped:
            if owner == module:  # not `transformer.x` of a pipeline's folder, but `x`
                for further, meaning in enumerate(self._meanings(path)):
                    if meaning.order is None:
                        place = index.setdefault(meaning.path, {}).setdefault(module, [])
                        place.append((level * _MEANINGS + further, path, name))

    def find(self, path: str, *, of_bias: bool) -> Found | None:
        """Find the bias of a module, or its weight or bare parameter.

        Raises:
            CheckpointError: Several tensors of one denoiser have this name but for punctuation.
        """
        for module, rest, meaning in self._read(path):
            if found := self._of(meaning.path, rest, module, of_bias=of_bias):
                return Found(rest, tuple(found.values()), meaning)
        return None

    def weights(self, path: str) -> list[str]:
        """List the weights (or bare parameters) of a module, in every denoiser that has it."""
        found = self.find(path, of_bias=False)
        return list(found.names) if found else []

    def find_parts(self, path: str, *, of_bias: bool) -> FoundParts | None:
        """Find the tensors over which the rows of a fused module are dealt."""
        for module, rest, meaning in self._read(path):
            for fusion, parts in parts_of(meaning.path):
                found = [self._of(part, rest, module, of_bias=of_bias) for part in parts]
                shared = [d for d in found[0] if all(d in names for names in found)]
                if shared:
                    dealt = tuple(tuple(names[d] for names in found) for d in shared)
                    return FoundParts(rest, fusion, dealt, meaning)
        return None

    def find_whole(self, path: str, *, of_bias: bool) -> FoundWhole | None:
        """Find the fused tensor that a module is a part of."""
        for module, rest, meaning in self._read(path):
            if meaning.order is not None:
                continue
            for fusion, number, whole in wholes_of(meaning.path):
                if found := self._of(whole, rest, module, of_bias=of_bias):
                    return FoundWhole(rest, fusion, number, tuple(found.values()))
        return None

    def _of(self, flat: str, path: str, module: str, *, of_bias: bool) -> dict[str, str]:
        """Return a module's tensor in every denoiser that is meant, by the denoiser's prefix."""
        named = (self._biases if of_bias else self._weights).get(flat, {})
        return {
            denoiser: _nearest(candidates, path)
            for denoiser, candidates in named.items()
            if self._is_meant(denoiser, module, named)
        }

    def _read(self, path: str) -> Iterator[tuple[str, str, Spelling]]:
        """Yield what a path may mean: a module of the pipeline, the path in it, and a name."""
        if self._is_of_pair:
            path = _FIRST_OF_TWO.sub("transformer.", path)
            path = _SECOND_OF_TWO.sub("transformer_2.", path)
        read = list(_unwrapped(path))
        # Flat, `transformer.blocks` looks like `transformer_blocks` of another family: the module
        # is taken off first, though names of CogVideoX's original code begin with it.
        read.sort(key=lambda one: not one[1] and _MODULE.match(one[2]) is not None)
        for _, module, rest in read:
            for meaning in self._meanings(rest):
                yield module, rest, meaning

    def _meanings(self, path: str) -> Iterator[Spelling]:
        """Yield a path's own flat name, then those that diffusers has for it."""
        flat = path.replace(".", "_").replace("_processor_", "_")
        yield Spelling(_comparable(flat))
        for meaning in self._spellings(flat):
            yield Spelling(_comparable(meaning.path), meaning.order)

    def _is_meant(self, denoiser: str, module: str, named: Iterable[str]) -> bool:
        if self._only and denoiser not in self._only | {""}:
            return False
        if module in _PARTICULAR:
            return denoiser == module
        if module and self._exact:
            return denoiser in (module, "")
        # The image projector is no denoiser: it is meant only if nothing else has such a name.
        return denoiser != "image_projector." or set(named) == {denoiser}


def component_of(path: str) -> str:
    """Name the part of a pipeline that a path of a LoRA file begins with; empty if it does not."""
    if other := _OTHER_COMPONENT.match(path):
        return other[1] or other[2]
    return next((module.rstrip(".") for _, module, _ in _unwrapped(path) if module), "")


def is_other_component(path: str) -> bool:
    """Check whether a path is of a part of a pipeline that is never merged (`text_encoder`)."""
    return _OTHER_COMPONENT.match(path) is not None


def bare_path(path: str) -> str:
    """Take every wrapper and a module's name off a path."""
    *_, (_, _, rest) = _unwrapped(path)
    return rest


def _unwrapped(path: str) -> Iterator[tuple[int, str, str]]:
    """Yield what a path may mean: how much was taken off it, the module it named, and the rest."""
    rest = ".".join(part for part in path.split(".") if part not in BETWEEN)
    module, rest, level = "", _BETWEEN_FLAT.sub("", rest), 0
    yield level, module, rest
    while True:
        if not module and (found := _MODULE.match(rest)):
            module = found[0]
        else:
            found = _WRAPPER.match(rest)
        if found is None or found.end() == len(rest):
            return
        level, rest = level + 1, rest[found.end() :]
        yield level, module, rest


def _no_such_module(wanted: Sequence[str], held: Sequence[str]) -> CheckpointError:
    return CheckpointError(
        f"The header of the LoRA says that it is for `{'`, `'.join(wanted)}`; the model has "
        f"`{'`, `'.join(held)}`.",
        fix="Use it with the model that it was made for, or with one denoiser's own weights.",
    )


def _nearest(candidates: list[tuple[int, str, str]], path: str) -> str:
    """Choose the tensor whose name is spelled like a path, of those that are wrapped least."""
    least = min(level for level, _, _ in candidates)
    names = [(spelled, name) for level, spelled, name in candidates if level == least]
    exact = [name for spelled, name in names if spelled == path]
    if len(names) > 1 and len(exact) != 1:
        raise CheckpointError(
            f"`{path}` of the LoRA may be " + " or ".join(f"`{name}`" for _, name in names) + ".",
            fix="Write the layer in the LoRA file with the dots of the model's own name.",
        )
    return exact[0] if exact else names[0][1]


_MEANINGS = 100
"""More than a name has."""


def _comparable(flat: str) -> str:
    """Take out of a flat path what not every file writes."""
    flat = flat.replace("_processor_", "_")
    return f"{flat}_0" if flat.endswith("_to_out") else flat


def is_dealt_by_head(path: str, adapters: Iterable[str]) -> bool:
    """Check whether the rows of q, k and v may be dealt by head, which their shapes do not show.

    LoRAs of DiffSynth-Studio for MiniMax-H3 are so; their mark is the adapter's name `default` on
    the original names, as diffusers recognises them.
    """
    template, _ = split_number(path.replace(".", "_"))
    return template in _BY_HEAD and tuple(adapters) == ("default",)


_BY_HEAD = {path.replace(".", "_") for path in MINIMAX_H3_SHARDS_STYLE.interleaved}
