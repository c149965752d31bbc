"""Names of Wan 2.1 and 2.2, VACE, Animate, SkyReels-V2 and ChronoEdit.

Source: diffusers 0.42, `convert_wan_transformer_to_diffusers`,
`convert_wan_animate_2_transformer_to_diffusers`.
"""

from __future__ import annotations

from collections.abc import Mapping

from motionmerge.merging.names.rules import Names

_BLOCK: Mapping[str, str] = {
    "self_attn.q": "attn1.to_q",
    "self_attn.k": "attn1.to_k",
    "self_attn.v": "attn1.to_v",
    "self_attn.o": "attn1.to_out.0",
    "self_attn.norm_q": "attn1.norm_q",
    "self_attn.norm_k": "attn1.norm_k",
    "cross_attn.q": "attn2.to_q",
    "cross_attn.k": "attn2.to_k",
    "cross_attn.v": "attn2.to_v",
    "cross_attn.o": "attn2.to_out.0",
    "cross_attn.norm_q": "attn2.norm_q",
    "cross_attn.norm_k": "attn2.norm_k",
    "cross_attn.k_img": "attn2.add_k_proj",
    "cross_attn.v_img": "attn2.add_v_proj",
    "cross_attn.norm_k_img": "attn2.norm_added_k",
    "ffn.0": "ffn.net.0.proj",
    "ffn.2": "ffn.net.2",
    "norm3": "norm2",
    "modulation": "scale_shift_table",
}

_FUSED: Mapping[str, str] = {
    "self_attn.qkv": "attn1.to_qkv",
    "cross_attn.kv": "attn2.to_kv",
}


def _blocks(stem: str, layers: Mapping[str, str]) -> dict[str, str]:
    return {f"{stem}.{{}}.{theirs}": f"{stem}.{{}}.{ours}" for theirs, ours in layers.items()}


WAN: Mapping[str, str] = {
    **_blocks("blocks", _BLOCK),
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
"""Wan, SkyReels-V2 and ChronoEdit. `img_emb.emb_pos` rests on a reading (Wan 2.1 FLF2V)."""

VACE: Mapping[str, str] = {
    **_blocks("vace_blocks", _BLOCK),
    "vace_blocks.{}.before_proj": "vace_blocks.{}.proj_in",
    "vace_blocks.{}.after_proj": "vace_blocks.{}.proj_out",
    "vace_patch_embedding": "vace_patch_embedding",
}
"""What VACE has beyond Wan."""

_CONVS = "motion_encoder.enc.net_app.convs"
_OUR_CONVS = "motion_encoder.res_blocks"
_NUM_CONVS = 7

ANIMATE: Mapping[str, str] = {
    "pose_patch_embedding": "pose_patch_embedding",
    "face_adapter.fuser_blocks.{}.linear1_q": "face_adapter.{}.to_q",
    "face_adapter.fuser_blocks.{}.linear1_kv": "face_adapter.{}.to_kv",
    "face_adapter.fuser_blocks.{}.linear2": "face_adapter.{}.to_out",
    "face_adapter.fuser_blocks.{}.q_norm": "face_adapter.{}.norm_q",
    "face_adapter.fuser_blocks.{}.k_norm": "face_adapter.{}.norm_k",
    "face_encoder.conv1_local.conv": "face_encoder.conv1_local",
    "face_encoder.conv2.conv": "face_encoder.conv2",
    "face_encoder.conv3.conv": "face_encoder.conv3",
    "face_encoder.out_proj": "face_encoder.out_proj",
    "face_encoder.padding_tokens": "face_encoder.padding_tokens",
    "motion_encoder.dec.direction.weight": "motion_encoder.motion_synthesis_weight",
    "motion_encoder.enc.fc.{}": "motion_encoder.motion_network.{}",
    f"{_CONVS}.0.0": "motion_encoder.conv_in",
    f"{_CONVS}.0.1": "motion_encoder.conv_in.act_fn",
    f"{_CONVS}.8": "motion_encoder.conv_out",
    **{
        f"{_CONVS}.{number + 1}.{theirs}": f"{_OUR_CONVS}.{number}.{ours}"
        for number in range(_NUM_CONVS)
        for theirs, ours in {
            "conv1.0": "conv1",
            "conv1.1": "conv1.act_fn",
            "conv2.1": "conv2",
            "conv2.2": "conv2.act_fn",
            "skip.1": "conv_skip",
        }.items()
    },
}
"""What Animate has beyond Wan."""

_ANIMATE_2_BLOCK: Mapping[str, str] = {
    **{
        f"{attention}.{theirs}": f"{attention}.{ours}"
        for attention in ("self_attn", "cross_attn")
        for theirs, ours in {"q": "to_q", "k": "to_k", "v": "to_v", "o": "to_out.0"}.items()
    },
    "cross_attn.k_img": "cross_attn.add_k_proj",
    "cross_attn.v_img": "cross_attn.add_v_proj",
    "cross_attn.norm_k_img": "cross_attn.norm_added_k",
    **{
        name: name
        for name in (
            "self_attn.norm_q",
            "self_attn.norm_k",
            "cross_attn.norm_q",
            "cross_attn.norm_k",
            "ffn.0",
            "ffn.2",
            "norm3",
            "modulation",
        )
    },
}

ANIMATE_2: Mapping[str, str] = {
    **{
        f"blocks.{{}}.block.{theirs}": f"blocks.{{}}.{ours}"
        for theirs, ours in _ANIMATE_2_BLOCK.items()
    },
    **{
        name: name
        for name in WAN
        if not name.startswith(("blocks.", "fps_")) and name != "img_emb.emb_pos"
    },
}
"""Animate 2, for which diffusers keeps the original names but those of attention."""

WAN_STYLE = Names(
    family="wan",
    style="original Wan",
    table={**WAN, **VACE, **ANIMATE},
    also={**_blocks("blocks", _FUSED), **_blocks("vace_blocks", _FUSED)},
    ones={f"{path}.bias": (1, 2) for path in ANIMATE if ANIMATE[path].endswith(".act_fn")},
    computed=(r"^motion_encoder\..*\.kernel$",),  # of a blur
)
ANIMATE_2_STYLE = Names(
    family="wan-animate-2",
    style="original Wan Animate 2",
    table=ANIMATE_2,
    also=_blocks("blocks", _ANIMATE_2_BLOCK),
)
