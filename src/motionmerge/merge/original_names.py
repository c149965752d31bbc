"""What the original code of a family calls its layers, beside the names of diffusers.

A `{}` stands for a block's number. A fused projection has the name that diffusers has for it
(`fuse_qkv_projections`); `attn.to_qkv_mlp` is ours.

Source: diffusers 0.42, loaders/single_file_utils.py, loaders/lora_conversion_utils.py.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

WAN: Mapping[str, str] = {
    "blocks.{}.self_attn.q": "blocks.{}.attn1.to_q",
    "blocks.{}.self_attn.k": "blocks.{}.attn1.to_k",
    "blocks.{}.self_attn.v": "blocks.{}.attn1.to_v",
    "blocks.{}.self_attn.qkv": "blocks.{}.attn1.to_qkv",
    "blocks.{}.self_attn.o": "blocks.{}.attn1.to_out.0",
    "blocks.{}.self_attn.norm_q": "blocks.{}.attn1.norm_q",
    "blocks.{}.self_attn.norm_k": "blocks.{}.attn1.norm_k",
    "blocks.{}.cross_attn.q": "blocks.{}.attn2.to_q",
    "blocks.{}.cross_attn.k": "blocks.{}.attn2.to_k",
    "blocks.{}.cross_attn.v": "blocks.{}.attn2.to_v",
    "blocks.{}.cross_attn.kv": "blocks.{}.attn2.to_kv",
    "blocks.{}.cross_attn.o": "blocks.{}.attn2.to_out.0",
    "blocks.{}.cross_attn.norm_q": "blocks.{}.attn2.norm_q",
    "blocks.{}.cross_attn.norm_k": "blocks.{}.attn2.norm_k",
    "blocks.{}.cross_attn.k_img": "blocks.{}.attn2.add_k_proj",
    "blocks.{}.cross_attn.v_img": "blocks.{}.attn2.add_v_proj",
    "blocks.{}.cross_attn.norm_k_img": "blocks.{}.attn2.norm_added_k",
    "blocks.{}.ffn.0": "blocks.{}.ffn.net.0.proj",
    "blocks.{}.ffn.2": "blocks.{}.ffn.net.2",
    "blocks.{}.norm3": "blocks.{}.norm2",
    "blocks.{}.modulation": "blocks.{}.scale_shift_table",
    "head.modulation": "scale_shift_table",
    "head.head": "proj_out",
    "patch_embedding": "patch_embedding",
    "text_embedding.0": "condition_embedder.text_embedder.linear_1",
    "text_embedding.2": "condition_embedder.text_embedder.linear_2",
    "time_embedding.0": "condition_embedder.time_embedder.linear_1",
    "time_embedding.2": "condition_embedder.time_embedder.linear_2",
    "time_projection.1": "condition_embedder.time_proj",
    "img_emb.proj.0": "condition_embedder.image_embedder.norm1",
    "img_emb.proj.1": "condition_embedder.image_embedder.ff.net.0.proj",
    "img_emb.proj.3": "condition_embedder.image_embedder.ff.net.2",
    "img_emb.proj.4": "condition_embedder.image_embedder.norm2",
    "img_emb.emb_pos": "condition_embedder.image_embedder.pos_embed",
    "fps_embedding": "fps_embedding",
    "fps_projection.0": "fps_projection.net.0.proj",
    "fps_projection.2": "fps_projection.net.2",
}
"""Wan and SkyReels-V2."""

_REFINER = "txt_in.individual_token_refiner.blocks.{}"
_OUR_REFINER = "context_embedder.token_refiner.refiner_blocks.{}"
_OUR_TEXT_TIME = "context_embedder.time_text_embed"

HUNYUAN_VIDEO: Mapping[str, str] = {
    "double_blocks.{}.img_attn_qkv": "transformer_blocks.{}.attn.to_qkv",
    "double_blocks.{}.img_attn_proj": "transformer_blocks.{}.attn.to_out.0",
    "double_blocks.{}.img_attn_q_norm": "transformer_blocks.{}.attn.norm_q",
    "double_blocks.{}.img_attn_k_norm": "transformer_blocks.{}.attn.norm_k",
    "double_blocks.{}.img_mod.linear": "transformer_blocks.{}.norm1.linear",
    "double_blocks.{}.img_mlp.fc1": "transformer_blocks.{}.ff.net.0.proj",
    "double_blocks.{}.img_mlp.fc2": "transformer_blocks.{}.ff.net.2",
    "double_blocks.{}.txt_attn_qkv": "transformer_blocks.{}.attn.to_added_qkv",
    "double_blocks.{}.txt_attn_proj": "transformer_blocks.{}.attn.to_add_out",
    "double_blocks.{}.txt_attn_q_norm": "transformer_blocks.{}.attn.norm_added_q",
    "double_blocks.{}.txt_attn_k_norm": "transformer_blocks.{}.attn.norm_added_k",
    "double_blocks.{}.txt_mod.linear": "transformer_blocks.{}.norm1_context.linear",
    "double_blocks.{}.txt_mlp.fc1": "transformer_blocks.{}.ff_context.net.0.proj",
    "double_blocks.{}.txt_mlp.fc2": "transformer_blocks.{}.ff_context.net.2",
    "single_blocks.{}.linear1": "single_transformer_blocks.{}.attn.to_qkv_mlp",
    "single_blocks.{}.linear2": "single_transformer_blocks.{}.proj_out",
    "single_blocks.{}.modulation.linear": "single_transformer_blocks.{}.norm.linear",
    "single_blocks.{}.q_norm": "single_transformer_blocks.{}.attn.norm_q",
    "single_blocks.{}.k_norm": "single_transformer_blocks.{}.attn.norm_k",
    f"{_REFINER}.self_attn_qkv": f"{_OUR_REFINER}.attn.to_qkv",
    f"{_REFINER}.self_attn_proj": f"{_OUR_REFINER}.attn.to_out.0",
    f"{_REFINER}.mlp.fc1": f"{_OUR_REFINER}.ff.net.0.proj",
    f"{_REFINER}.mlp.fc2": f"{_OUR_REFINER}.ff.net.2",
    f"{_REFINER}.norm1": f"{_OUR_REFINER}.norm1",
    f"{_REFINER}.norm2": f"{_OUR_REFINER}.norm2",
    f"{_REFINER}.adaLN_modulation.1": f"{_OUR_REFINER}.norm_out.linear",
    "txt_in.input_embedder": "context_embedder.proj_in",
    "txt_in.t_embedder.mlp.0": f"{_OUR_TEXT_TIME}.timestep_embedder.linear_1",
    "txt_in.t_embedder.mlp.2": f"{_OUR_TEXT_TIME}.timestep_embedder.linear_2",
    "txt_in.c_embedder.linear_1": f"{_OUR_TEXT_TIME}.text_embedder.linear_1",
    "txt_in.c_embedder.linear_2": f"{_OUR_TEXT_TIME}.text_embedder.linear_2",
    "img_in.proj": "x_embedder.proj",
    "time_in.mlp.0": "time_text_embed.timestep_embedder.linear_1",
    "time_in.mlp.2": "time_text_embed.timestep_embedder.linear_2",
    "guidance_in.mlp.0": "time_text_embed.guidance_embedder.linear_1",
    "guidance_in.mlp.2": "time_text_embed.guidance_embedder.linear_2",
    "vector_in.in_layer": "time_text_embed.text_embedder.linear_1",
    "vector_in.out_layer": "time_text_embed.text_embedder.linear_2",
    "final_layer.linear": "proj_out",
}
"""HunyuanVideo, FramePack. Not `final_layer.adaLN_modulation.1`, whose halves are swapped."""

_LTX_ALIKE = (
    "caption_projection.linear_1",
    "caption_projection.linear_2",
    "proj_out",
    *(
        f"transformer_blocks.{{}}.{layer}"
        for layer in (
            *(f"attn{i}.to_{part}" for i in (1, 2) for part in ("q", "k", "v", "out.0")),
            "ff.net.0.proj",
            "ff.net.2",
        )
    ),
)

LTX: Mapping[str, str] = {
    "patchify_proj": "proj_in",
    "adaln_single.emb.timestep_embedder.linear_1": "time_embed.emb.timestep_embedder.linear_1",
    "adaln_single.emb.timestep_embedder.linear_2": "time_embed.emb.timestep_embedder.linear_2",
    "adaln_single.linear": "time_embed.linear",
    "transformer_blocks.{}.attn1.q_norm": "transformer_blocks.{}.attn1.norm_q",
    "transformer_blocks.{}.attn1.k_norm": "transformer_blocks.{}.attn1.norm_k",
    "transformer_blocks.{}.attn2.q_norm": "transformer_blocks.{}.attn2.norm_q",
    "transformer_blocks.{}.attn2.k_norm": "transformer_blocks.{}.attn2.norm_k",
    **{name: name for name in _LTX_ALIKE},
}

ORIGINAL_NAMES: Mapping[str, Mapping[str, str]] = {
    "wan": WAN,
    "skyreels-v2": WAN,
    "hunyuan-video": HUNYUAN_VIDEO,
    "ltx": LTX,
}
"""The names of a family in `families.py`."""

_NUMBER = re.compile(r"blocks_(\d+)_")
_TO_DIFFUSERS = {
    old.replace(".", "_"): new.replace(".", "_")
    for names in ORIGINAL_NAMES.values()
    for old, new in names.items()
}


def to_diffusers(flat: str) -> str:
    """Give the name that diffusers has for a layer; another name stays as it is.

    Args:
        flat: A path with underscores for dots, e.g. `blocks_7_self_attn_q`.
    """
    template, number = split_number(flat)
    return _TO_DIFFUSERS.get(template, template).replace("{}", number)


def split_number(flat: str) -> tuple[str, str]:
    """Put `{}` in place of a block's number; the number comes second, empty if there is none."""
    found = _NUMBER.search(flat)
    if found is None:
        return flat, ""
    return f"{flat[: found.start(1)]}{{}}{flat[found.end(1) :]}", found[1]
