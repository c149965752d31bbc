"""Names of CogVideoX in its original code (SAT), and in ComfyUI, which reads those alone.

The first rest on a reading of diffusers' `scripts/convert_cogvideox_to_diffusers.py`: the installed
diffusers has no converter. `tests/comfyui` compares the second with ComfyUI's network.
"""

from __future__ import annotations

from collections.abc import Mapping

from motionmerge.merging.names.rules import Names, Order

_LAYER = "transformer.layers.{}"
_OURS = "transformer_blocks.{}"
_NORM = ("norm", "linear")
_MODULATIONS = "mixins.adaln_layer.adaLN_modulations.{}.1"

COGVIDEOX: Mapping[str, str] = {
    f"{_LAYER}.attention.query_key_value": f"{_OURS}.attn1.to_qkv",
    f"{_LAYER}.attention.dense": f"{_OURS}.attn1.to_out.0",
    f"{_LAYER}.mlp.dense_h_to_4h": f"{_OURS}.ff.net.0.proj",
    f"{_LAYER}.mlp.dense_4h_to_h": f"{_OURS}.ff.net.2",
    f"{_LAYER}.input_layernorm": f"{_OURS}.norm1.norm",
    f"{_LAYER}.post_attention_layernorm": f"{_OURS}.norm2.norm",
    "mixins.adaln_layer.query_layernorm_list.{}": f"{_OURS}.attn1.norm_q",
    "mixins.adaln_layer.key_layernorm_list.{}": f"{_OURS}.attn1.norm_k",
    _MODULATIONS: f"{_OURS}.norms.linear",
    "transformer.final_layernorm": "norm_final",
    "mixins.patch_embed.proj": "patch_embed.proj",
    "mixins.patch_embed.text_proj": "patch_embed.text_proj",
    "mixins.pos_embed.pos_embedding": "patch_embed.pos_embedding",
    "mixins.final_layer.norm_final": "norm_out.norm",
    "mixins.final_layer.adaLN_modulation.1": "norm_out.linear",
    "mixins.final_layer.linear": "proj_out",
    "time_embed.0": "time_embedding.linear_1",
    "time_embed.2": "time_embedding.linear_2",
    "ofs_embed.0": "ofs_embedding.linear_1",
    "ofs_embed.2": "ofs_embedding.linear_2",
}

_TWO_NORMS: Order = (
    *((0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2)),  # shift, scale and gate of the video
    *((0, 3), (0, 4), (0, 5), (1, 3), (1, 4), (1, 5)),  # and of the text
)

COGVIDEOX_STYLE = Names(
    family="cogvideox",
    style="original CogVideoX",
    table=COGVIDEOX,
    orders={_MODULATIONS: _TWO_NORMS},
    computed=(r"freqs_(sin|cos)$", r"position_embeddings?\b", r"embed_tokens\b"),
)

_BLOCK: Mapping[str, str] = {
    "q": "attn1.to_q",
    "k": "attn1.to_k",
    "v": "attn1.to_v",
    "norm_q": "attn1.norm_q",
    "norm_k": "attn1.norm_k",
    "attn_out": "attn1.to_out.0",
    "ff_proj": "ff.net.0.proj",
    "ff_out": "ff.net.2",
    **{f"{norm}.{part}": f"{norm}.{part}" for norm in ("norm1", "norm2") for part in _NORM},
}

COGVIDEOX_COMFYUI_STYLE = Names(
    family="cogvideox",
    style="ComfyUI's CogVideoX",
    table={
        **{f"blocks.{{}}.{theirs}": f"{_OURS}.{ours}" for theirs, ours in _BLOCK.items()},
        **{
            f"{stem}_embedding_linear_{n}": f"{stem}_embedding.linear_{n}"
            for stem in ("time", "ofs")
            for n in (1, 2)
        },
        **{
            name: name
            for name in (
                "patch_embed.proj",
                "patch_embed.text_proj",
                "patch_embed.pos_embedding",
                "norm_final",
                "norm_out.norm",
                "norm_out.linear",
                "proj_out",
            )
        },
    },
)
