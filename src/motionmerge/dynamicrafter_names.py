"""Official names of DynamiCrafter's U-Net and image projector beside ours, as lists of renames.

Official: the modules of `lvdm/`. Our side: `unet.py` and `image_projector.py` of its models.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from motionmerge.errors import CheckpointError


@dataclass(frozen=True)
class Rename:
    """One module path, or one tensor, under both names.

    Attributes:
        official: Its official name.
        ours: Its name here; several when the official tensor is cut along its first dimension
            into as many equal parts.
        unit_dims: Trailing dimensions of size one that the official weight has and ours has not (a
            convolution over one point, where we have a linear layer).
    """

    official: str
    ours: tuple[str, ...]
    unit_dims: int = 0


def find_rename(name: str, renames: Mapping[str, Rename]) -> tuple[Rename, str] | None:
    """Return the rename of the longest path that a name begins with, and the rest of the name.

    Args:
        name: A tensor, under the names of one side.
        renames: By path of that side.
    """
    path, rest = name, ""
    while path and path not in renames:
        path, _, last = path.rpartition(".")
        rest = f".{last}{rest}"
    return (renames[path], rest) if path else None


def each_renamed(
    pairs: Mapping[str, str], *, official: str = "", ours: str = ""
) -> Iterator[Rename]:
    """Return a rename for each pair of names, with a prefix before either."""
    for old, new in pairs.items():
        yield Rename(f"{official}{old}", (f"{ours}{new}",))


_RESIDUAL_BLOCK = {
    "in_layers.0": "resnet.norm1",
    "in_layers.2": "resnet.conv1",
    "emb_layers.1": "resnet.time_emb_proj",
    "out_layers.0": "resnet.norm2",
    "out_layers.3": "resnet.conv2",
    "skip_connection": "resnet.conv_shortcut",
    "temopral_conv": "temporal_conv",
}


def unet_renames(*, attention_levels: Sequence[bool], layers_per_block: int) -> list[Rename]:
    """List the layers of the U-Net, with or without temporal adapter.

    Official names are those inside `model.diffusion_model`, and, from the top level, `queries` and
    `qformer`.
    """
    renames = [
        *each_renamed(
            {
                "time_embed.0": "time_embedding.linear_1",
                "time_embed.2": "time_embedding.linear_2",
                "fps_embedding.0": "fps_embedding.linear_1",
                "fps_embedding.2": "fps_embedding.linear_2",
                "input_blocks.0.0": "conv_in",
                "out.0": "norm_out",
                "out.2": "conv_out",
                "queries": "temporal_adapter.queries",
                "qformer": "temporal_adapter",
            }
        ),
        *_temporal_transformer("init_attn.0", "temporal_in"),
        Rename("init_attn.0.proj_in", ("temporal_in.proj_in",), unit_dims=1),
        Rename("init_attn.0.proj_out", ("temporal_in.proj_out",), unit_dims=1),
        *_stage("middle_block.{}", "mid_stages.0", parts=(0, 1, 2)),
        *_stage("middle_block.{}", "mid_stages.1", parts=(3,)),
    ]
    blocks = layers_per_block + 1  # a level: residual blocks and downsampler; or residual blocks
    for level, attends_on_way_up in enumerate(reversed(attention_levels)):
        for layer in range(layers_per_block):
            stage = f"down_stages.{level * layers_per_block + layer}"
            renames += _stage(f"input_blocks.{level * blocks + 1 + layer}.{{}}", stage)
        for block in range(level * blocks, (level + 1) * blocks):
            renames += _stage(f"output_blocks.{block}.{{}}", f"up_stages.{block}")
        upsampler = 3 if attends_on_way_up else 1  # after residual block and attentions
        resamplers = {
            f"input_blocks.{(level + 1) * blocks}.0.op": f"downsamplers.{level}.conv",
            f"output_blocks.{block}.{upsampler}.conv": f"upsamplers.{level}.conv",
        }
        renames += each_renamed(resamplers)
    return renames


def _stage(official: str, ours: str, parts: tuple[int, ...] = (0, 1, 2)) -> Iterator[Rename]:
    """Map a stage: residual block with temporal convolution, spatial and temporal attention."""
    yield from each_renamed(
        _RESIDUAL_BLOCK, official=f"{official.format(parts[0])}.", ours=f"{ours}."
    )
    if len(parts) == 3:
        spatial, block = official.format(parts[1]), "transformer_blocks.0.attn2"
        for layer in ("norm", "proj_in", "proj_out", "transformer_blocks"):
            yield Rename(f"{spatial}.{layer}", (f"{ours}.attention.{layer}",))
        for kind in ("to_k_ip", "to_v_ip"):
            name = f"{ours}.attention.{block}.processor.{kind}.0"
            yield Rename(f"{spatial}.{block}.{kind}", (name,))
        yield from _temporal_transformer(official.format(parts[2]), f"{ours}.temporal_attention")


def _temporal_transformer(official: str, ours: str) -> Iterator[Rename]:
    for layer in ("norm", "proj_in", "proj_out", "transformer_blocks"):
        yield Rename(f"{official}.{layer}", (f"{ours}.{layer}",))
    yield Rename(f"{official}.cc_projection", (f"{ours}.fusion.proj",))


def image_projector_renames(*, depth: int) -> list[Rename]:
    """List the layers of the image projector; official names are inside `image_proj_model`."""
    names = ("latents", "proj_in", "proj_out", "norm_out")
    renames = list(each_renamed({name: name for name in names}))
    for i in range(depth):
        block = f"layers.{i}"
        renames += each_renamed(
            {
                "0.norm1": "ln0",
                "0.norm2": "ln1",
                "0.to_q": "attn.to_q",
                "0.to_out": "attn.to_out.0",
                "1.0": "ff.0",
                "1.1": "ff.1.net.0.proj",
                "1.3": "ff.1.net.2",
            },
            official=f"{block}.",
            ours=f"{block}.",
        )
        parts = (f"{block}.attn.to_k", f"{block}.attn.to_v")
        renames.append(Rename(f"{block}.0.to_kv", parts))
    return renames


def unet_layout_of_official(names: Iterable[str]) -> dict[str, Any]:
    """Find `attention_levels` and `layers_per_block` from official U-Net names.

    Raises:
        CheckpointError: these are not the names of a DynamiCrafter U-Net.
    """
    names = set(names)
    downsamplers = sorted(
        int(match[1])
        for name in names
        if (match := re.fullmatch(r"input_blocks\.(\d+)\.0\.op\.weight", name))
    )
    num_blocks = count_indices(names, r"input_blocks\.(\d+)\.")
    if not num_blocks or "init_attn.0.proj_in.weight" not in names:
        raise CheckpointError(
            "These are not the tensors of a DynamiCrafter U-Net.",
            fix="Pass an official checkpoint with `input_blocks.*` and `init_attn.*`, of the "
            "256, 512 or 1024 model.",
        )
    step = downsamplers[0] if downsamplers else num_blocks
    starts = range(1, num_blocks, step)
    return {
        "attention_levels": [f"input_blocks.{start}.1.norm.weight" in names for start in starts],
        "layers_per_block": step - 1,
    }


def unet_layout_of_ours(names: Iterable[str]) -> dict[str, Any]:
    """Find `attention_levels` and `layers_per_block` from the names of a `DynamiCrafterUNet`.

    Raises:
        CheckpointError: these are not its names.
    """
    names = set(names)
    num_levels = count_indices(names, r"downsamplers\.(\d+)\.") + 1
    num_stages = count_indices(names, r"down_stages\.(\d+)\.")
    if not num_stages or num_stages % num_levels:
        raise CheckpointError(
            "These are not the tensors of a DynamiCrafterUNet.",
            fix="Pass `unet.state_dict()`, or weights saved by `save_pretrained`.",
        )
    layers = num_stages // num_levels
    return {
        "attention_levels": [
            f"down_stages.{level * layers}.attention.norm.weight" in names
            for level in range(num_levels)
        ],
        "layers_per_block": layers,
    }


def count_indices(names: Iterable[str], pattern: str) -> int:
    """Count the numbered modules among names: one more than the largest number, 0 for none."""
    found = [int(match[1]) for name in names if (match := re.match(pattern, name))]
    return max(found, default=-1) + 1
