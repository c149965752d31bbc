"""Names of every DynamiCrafter tensor: the official ones beside ours, readable both ways.

A component's map is a list of `Rename`s of module paths; the longest path that fits wins, what
follows it is kept. Official: the modules of `lvdm/` and of OpenCLIP. Our side: unet.py,
image_projector.py, diffusers' `AutoencoderKL`, transformers' CLIP towers.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch

from motionmerge.dynamicrafter_names import (
    Rename,
    each_renamed,
    find_rename,
)

_MOST_RESNETS_A_LEVEL = 8  # of the autoencoder; released ones have two and three


@dataclass(frozen=True)
class TensorPair:
    """One official tensor and the one or several of ours that hold its numbers."""

    official: str
    ours: tuple[str, ...]
    unit_dims: int = 0

    def to_ours(self, tensor: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Turn the official tensor into ours; a view where possible."""
        if self.unit_dims and tensor.ndim > 2:
            tensor = tensor.flatten(1)
        return tensor.chunk(len(self.ours))

    def to_official(self, tensors: Iterable[torch.Tensor]) -> torch.Tensor:
        """Turn ours back into the official tensor."""
        parts = list(tensors)
        tensor = torch.cat(parts) if len(parts) > 1 else parts[0]
        return tensor.reshape(*tensor.shape, *[1] * self.unit_dims)


class KeyMap:
    """The renames of one component, looked up from either side."""

    def __init__(self, renames: Iterable[Rename]) -> None:
        self._by_official = {rename.official: rename for rename in renames}
        self._by_ours = {rename.ours[0]: rename for rename in self._by_official.values()}

    def pair_official(self, keys: Iterable[str]) -> tuple[list[TensorPair], list[str]]:
        """Pair official tensor names with ours; names that no rename covers come second."""
        return self._pair(keys, self._by_official)

    def pair_ours(self, keys: Iterable[str]) -> tuple[list[TensorPair], list[str]]:
        """Pair our tensor names with official ones; names that no rename covers come second."""
        pairs, left_over = self._pair(keys, self._by_ours)
        parts = {name for pair in pairs for name in pair.ours}
        return pairs, [key for key in left_over if key not in parts]

    @staticmethod
    def _pair(
        keys: Iterable[str], table: Mapping[str, Rename]
    ) -> tuple[list[TensorPair], list[str]]:
        pairs, left_over = [], []
        for key in keys:
            found = find_rename(key, table)
            if found is None:
                left_over.append(key)
                continue
            rename, rest = found
            unit_dims = rename.unit_dims if rest == ".weight" else 0
            ours = tuple(f"{name}{rest}" for name in rename.ours)
            pairs.append(TensorPair(f"{rename.official}{rest}", ours, unit_dims))
        return pairs, left_over


def vae_key_map(*, num_levels: int) -> KeyMap:
    """Map the autoencoder; official names are those inside `first_stage_model`."""
    resnet = {"": "", ".nin_shortcut": ".conv_shortcut"}
    renames = list(each_renamed({"quant_conv": "quant_conv", "post_quant_conv": "post_quant_conv"}))
    for half in ("encoder", "decoder"):
        renames += each_renamed(
            {"conv_in": "conv_in", "norm_out": "conv_norm_out", "conv_out": "conv_out"},
            official=f"{half}.",
            ours=f"{half}.",
        )
        for i in (0, 1):
            name = f"{half}.mid_block.resnets.{i}"
            renames += each_renamed(resnet, official=f"{half}.mid.block_{i + 1}", ours=name)
        attention = f"{half}.mid_block.attentions.0"
        renames.append(Rename(f"{half}.mid.attn_1.norm", (f"{attention}.group_norm",)))
        for old, new in {"q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}.items():
            name = f"{attention}.{new}"
            renames.append(Rename(f"{half}.mid.attn_1.{old}", (name,), unit_dims=2))
    for level in range(num_levels):
        down, up = f"encoder.down_blocks.{level}", f"decoder.up_blocks.{num_levels - 1 - level}"
        for i in range(_MOST_RESNETS_A_LEVEL):
            renames += each_renamed(
                resnet, official=f"encoder.down.{level}.block.{i}", ours=f"{down}.resnets.{i}"
            )
            renames += each_renamed(
                resnet, official=f"decoder.up.{level}.block.{i}", ours=f"{up}.resnets.{i}"
            )
        renames += each_renamed(
            {
                f"encoder.down.{level}.downsample.conv": f"{down}.downsamplers.0.conv",
                f"decoder.up.{level}.upsample.conv": f"{up}.upsamplers.0.conv",
            }
        )
    return KeyMap(renames)


def text_encoder_key_map(*, layers: int) -> KeyMap:
    """Map OpenCLIP's text tower; official names are those inside `cond_stage_model.model`."""
    return KeyMap(
        [
            *each_renamed(
                {
                    "token_embedding": "embeddings.token_embedding",
                    "positional_embedding": "embeddings.position_embedding.weight",
                    "ln_final": "final_layer_norm",
                }
            ),
            *_clip_layers(layers),
        ]
    )


def image_encoder_key_map(*, layers: int) -> KeyMap:
    """Map OpenCLIP's vision tower; official names are those inside `embedder.model.visual`."""
    return KeyMap(
        [
            *each_renamed(
                {
                    "class_embedding": "embeddings.class_embedding",
                    "positional_embedding": "embeddings.position_embedding.weight",
                    "conv1": "embeddings.patch_embedding",
                    "ln_pre": "pre_layrnorm",
                    "ln_post": "post_layernorm",
                }
            ),
            *_clip_layers(layers),
        ]
    )


def _clip_layers(count: int) -> Iterator[Rename]:
    for i in range(count):
        official, ours = f"transformer.resblocks.{i}", f"encoder.layers.{i}"
        yield from each_renamed(
            {
                "ln_1": "layer_norm1",
                "ln_2": "layer_norm2",
                "attn.out_proj": "self_attn.out_proj",
                "mlp.c_fc": "mlp.fc1",
                "mlp.c_proj": "mlp.fc2",
            },
            official=f"{official}.",
            ours=f"{ours}.",
        )
        for kind in ("weight", "bias"):
            parts = tuple(f"{ours}.self_attn.{part}_proj.{kind}" for part in "qkv")
            yield Rename(f"{official}.attn.in_proj_{kind}", parts)
