"""Names of HunyuanVideo and HunyuanVideo 1.5: of the original code, and of ComfyUI.

Source: diffusers 0.42, `convert_hunyuan_video_transformer_to_diffusers`. ComfyUI's spelling and the
names of 1.5 rest on a reading of ComfyUI and of diffusers' scripts.
"""

from __future__ import annotations

from collections.abc import Mapping

from motionmerge.merging.names.rules import SWAPPED, Names

_REFINER = "txt_in.individual_token_refiner.blocks.{}"
_OUR_REFINER = "context_embedder.token_refiner.refiner_blocks.{}"
_OUR_TEXT_TIME = "context_embedder.time_text_embed"
_FINAL = "final_layer.adaLN_modulation.1"

_SHARED: Mapping[str, str] = {
    "double_blocks.{}.img_attn_proj": "transformer_blocks.{}.attn.to_out.0",
    "double_blocks.{}.img_attn_q_norm": "transformer_blocks.{}.attn.norm_q",
    "double_blocks.{}.img_attn_k_norm": "transformer_blocks.{}.attn.norm_k",
    "double_blocks.{}.img_mod.linear": "transformer_blocks.{}.norm1.linear",
    "double_blocks.{}.img_mlp.fc1": "transformer_blocks.{}.ff.net.0.proj",
    "double_blocks.{}.img_mlp.fc2": "transformer_blocks.{}.ff.net.2",
    "double_blocks.{}.txt_attn_proj": "transformer_blocks.{}.attn.to_add_out",
    "double_blocks.{}.txt_attn_q_norm": "transformer_blocks.{}.attn.norm_added_q",
    "double_blocks.{}.txt_attn_k_norm": "transformer_blocks.{}.attn.norm_added_k",
    "double_blocks.{}.txt_mod.linear": "transformer_blocks.{}.norm1_context.linear",
    "double_blocks.{}.txt_mlp.fc1": "transformer_blocks.{}.ff_context.net.0.proj",
    "double_blocks.{}.txt_mlp.fc2": "transformer_blocks.{}.ff_context.net.2",
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
    _FINAL: "norm_out.linear",
    "final_layer.linear": "proj_out",
}

_IMAGE_QKV = "double_blocks.{}.img_attn_qkv"
_TEXT_QKV = "double_blocks.{}.txt_attn_qkv"
_OUR_IMAGE_QKV = "transformer_blocks.{}.attn.to_qkv"
_OUR_TEXT_QKV = "transformer_blocks.{}.attn.to_added_qkv"

HUNYUAN_VIDEO: Mapping[str, str] = {
    **_SHARED,
    _IMAGE_QKV: _OUR_IMAGE_QKV,
    _TEXT_QKV: _OUR_TEXT_QKV,
    "single_blocks.{}.linear1": "single_transformer_blocks.{}.attn.to_qkv_mlp",
    "single_blocks.{}.linear2": "single_transformer_blocks.{}.proj_out",
    "single_blocks.{}.modulation.linear": "single_transformer_blocks.{}.norm.linear",
    "single_blocks.{}.q_norm": "single_transformer_blocks.{}.attn.norm_q",
    "single_blocks.{}.k_norm": "single_transformer_blocks.{}.attn.norm_k",
    "time_in.mlp.0": "time_text_embed.timestep_embedder.linear_1",
    "time_in.mlp.2": "time_text_embed.timestep_embedder.linear_2",
    "guidance_in.mlp.0": "time_text_embed.guidance_embedder.linear_1",
    "guidance_in.mlp.2": "time_text_embed.guidance_embedder.linear_2",
    "vector_in.in_layer": "time_text_embed.text_embedder.linear_1",
    "vector_in.out_layer": "time_text_embed.text_embedder.linear_2",
}
"""HunyuanVideo in the names of its original code, musubi-tuner and diffusion-pipe. FramePack is
published in names of diffusers; its LoRAs may have these."""

_VISION = {"0": "norm_in", "1": "linear_1", "3": "linear_2", "4": "norm_out"}

HUNYUAN_VIDEO_15: Mapping[str, str] = {
    **_SHARED,
    **{
        f"double_blocks.{{}}.{stream}_attn_{part}": f"transformer_blocks.{{}}.attn.{ours}"
        for stream, layers in {
            "img": {"q": "to_q", "k": "to_k", "v": "to_v"},
            "txt": {"q": "add_q_proj", "k": "add_k_proj", "v": "add_v_proj"},
        }.items()
        for part, ours in layers.items()
    },
    "time_in.mlp.0": "time_embed.timestep_embedder.linear_1",
    "time_in.mlp.2": "time_embed.timestep_embedder.linear_2",
    "time_r_in.mlp.0": "time_embed.timestep_embedder_r.linear_1",
    "time_r_in.mlp.2": "time_embed.timestep_embedder_r.linear_2",
    "byt5_in.layernorm": "context_embedder_2.norm",
    "byt5_in.fc1": "context_embedder_2.linear_1",
    "byt5_in.fc2": "context_embedder_2.linear_2",
    "byt5_in.fc3": "context_embedder_2.linear_3",
    **{f"vision_in.proj.{n}": f"image_embedder.{ours}" for n, ours in _VISION.items()},
    "cond_type_embedding": "cond_type_embed",
}

_COMFYUI = (
    ("t_embedder.mlp.0", "t_embedder.in_layer"),
    ("t_embedder.mlp.2", "t_embedder.out_layer"),
    ("c_embedder.linear_1", "c_embedder.in_layer"),
    ("c_embedder.linear_2", "c_embedder.out_layer"),
    ("_in.mlp.0", "_in.in_layer"),
    ("_in.mlp.2", "_in.out_layer"),
    ("_mod.linear", "_mod.lin"),
    ("modulation.linear", "modulation.lin"),
    ("_attn_qkv", "_attn.qkv"),
    ("_attn_proj", "_attn.proj"),
    ("_attn_q_norm", "_attn.norm.query_norm"),
    ("_attn_k_norm", "_attn.norm.key_norm"),
    (".q_norm", ".norm.query_norm"),
    (".k_norm", ".norm.key_norm"),
    ("mlp.fc1", "mlp.0"),
    ("mlp.fc2", "mlp.2"),
)


def _in_comfyui(path: str) -> str:
    for theirs, comfyui in _COMFYUI:
        path = path.replace(theirs, comfyui)
    return path


def _comfyui(table: Mapping[str, str]) -> tuple[dict[str, str], dict[str, str]]:
    """Return the table in ComfyUI's spelling, and what it had before February 2026: `scale`."""
    renamed = {_in_comfyui(path): ours for path, ours in table.items()}
    norms = {
        path: ours for path, ours in renamed.items() if path.endswith(("query_norm", "key_norm"))
    }
    return renamed, {f"{path}.scale": f"{ours}.weight" for path, ours in norms.items()}


_FUSED = {_IMAGE_QKV: _OUR_IMAGE_QKV, _TEXT_QKV: _OUR_TEXT_QKV}
_FUSED_15 = {
    path: ours for path, ours in HUNYUAN_VIDEO_15.items() if not path.endswith(("_q", "_k", "_v"))
} | _FUSED

HUNYUAN_VIDEO_COMFYUI, _OLDER = _comfyui(HUNYUAN_VIDEO)
HUNYUAN_VIDEO_15_COMFYUI, _OLDER_15 = _comfyui(_FUSED_15)

_HIDDEN = "single_blocks.{}.linear2"

HUNYUAN_COMFYUI_STYLE = Names(
    family="hunyuan-video",
    style="ComfyUI's HunyuanVideo",
    table=HUNYUAN_VIDEO_COMFYUI,
    also=_OLDER,
    orders={_FINAL: SWAPPED},
    alike={"single_blocks.{}.linear1": _HIDDEN},
)
HUNYUAN_STYLE = Names(
    family="hunyuan-video",
    style="original HunyuanVideo",
    table=HUNYUAN_VIDEO,
    orders={_FINAL: SWAPPED},
    alike={"single_blocks.{}.linear1": _HIDDEN},
)
HUNYUAN_15_COMFYUI_STYLE = Names(
    family="hunyuan-video-1.5",
    style="ComfyUI's HunyuanVideo 1.5",
    table=HUNYUAN_VIDEO_15_COMFYUI,
    also=_OLDER_15,
    orders={_FINAL: SWAPPED},
)
HUNYUAN_15_STYLE = Names(
    family="hunyuan-video-1.5",
    style="original HunyuanVideo 1.5",
    table=HUNYUAN_VIDEO_15,
    also=_FUSED,
    orders={_FINAL: SWAPPED},
)
HUNYUAN_15_FUSED_STYLE = Names(
    family="hunyuan-video-1.5",
    style="HunyuanVideo 1.5 with fused projections",
    table=_FUSED_15,
    orders={_FINAL: SWAPPED},
)
"""Single files, which ComfyUI recognises; it is read as `also` of `HUNYUAN_15_STYLE`."""
