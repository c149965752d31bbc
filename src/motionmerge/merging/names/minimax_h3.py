"""Names of MiniMax-H3, as published files stack its rows, and as the original shards deal them.

Source: diffusers 0.42, `convert_minimax_h3_transformer_checkpoint_to_diffusers`,
`_convert_non_diffusers_minimax_h3_lora_to_diffusers`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from motionmerge.merging.names.rules import SWAPPED, Names

_STACKS = {
    "blocks.{}": "transformer_blocks.{}",
    "token_refiner.blocks.{}": "token_refiner.refiner_blocks.{}",
}
_BLOCK: Mapping[str, str] = {
    "attn.qkv_proj": "attn.to_qkv",
    "attn.out_proj": "attn.to_out.0",
    "attn.q_norm": "attn.norm_q",
    "attn.k_norm": "attn.norm_k",
    "mlp.fc1": "ff.net.0.proj",
    "mlp.fc2": "ff.net.2",
    "norm1": "norm1",
    "norm2": "norm2",
}

MINIMAX_H3: Mapping[str, str] = {
    **{
        f"{theirs}.{layer}": f"{ours}.{our_layer}"
        for theirs, ours in _STACKS.items()
        for layer, our_layer in _BLOCK.items()
    },
    "blocks.{}.adaln_proj.linear": "transformer_blocks.{}.adaln_proj.linear",
    "token_refiner.final_norm": "token_refiner.final_norm",
    "video_patch_proj": "proj_in",
    "audio_patch_proj": "audio_proj_in",
    "condition_proj": "context_embedder",
    "time_embedder.proj_in": "time_embedder.linear_1",
    "time_embedder.proj_out": "time_embedder.linear_2",
    "final_layer.norm": "norm_out.norm",
    "final_layer.adaln_proj.linear": "norm_out.linear",
    "final_layer.video_out": "proj_out",
    "final_layer.audio_out": "audio_proj_out",
}

MINIMAX_H3_STYLE = Names(
    family="minimax-h3",
    style="original MiniMax-H3, q, k and v stacked",
    table=MINIMAX_H3,
    orders={f"{stack}.mlp.fc1": SWAPPED for stack in _STACKS},
    computed=(r"^rope\.inv_freq$",),
)
"""Published single files, and LoRAs of ai-toolkit, musubi-tuner and ComfyUI."""

MINIMAX_H3_SHARDS_STYLE = replace(
    MINIMAX_H3_STYLE,
    style="original MiniMax-H3, q, k and v dealt by head",
    interleaved={f"{stack}.attn.qkv_proj": f"{stack}.attn.q_norm" for stack in _STACKS},
)
"""The original shards, and LoRAs of DiffSynth-Studio."""
