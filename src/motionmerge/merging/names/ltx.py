"""Names of LTX-Video and LTX-2, 2.3 and 2.5 among them, with the layers of sound.

Source: diffusers 0.42, `convert_ltx_transformer_checkpoint_to_diffusers`,
`convert_ltx2_transformer_to_diffusers`, `_convert_non_diffusers_ltx2_lora_to_diffusers`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from motionmerge.merging.names.rules import Names

_BLOCK = "transformer_blocks.{}"
_TIME = ("emb.timestep_embedder.linear_1", "emb.timestep_embedder.linear_2", "linear")
_NORMS = {"q_norm": "norm_q", "k_norm": "norm_k"}


def _time_embedding(theirs: str, ours: str) -> dict[str, str]:
    return {f"{theirs}.{layer}": f"{ours}.{layer}" for layer in _TIME}


def _attention(name: str, layers: Iterable[str]) -> dict[str, str]:
    stem = f"{_BLOCK}.{name}"
    return {f"{stem}.{theirs}": f"{stem}.{ours}" for theirs, ours in _NORMS.items()} | {
        f"{stem}.{layer}": f"{stem}.{layer}" for layer in layers
    }


def _alike(*names: str) -> dict[str, str]:
    return {name: name for name in names}


_PROJECTIONS = ("to_q", "to_k", "to_v", "to_out.0")

LTX: Mapping[str, str] = {
    "patchify_proj": "proj_in",
    **_time_embedding("adaln_single", "time_embed"),
    **_attention("attn1", _PROJECTIONS),
    **_attention("attn2", _PROJECTIONS),
    **_alike(
        f"{_BLOCK}.ff.net.0.proj",
        f"{_BLOCK}.ff.net.2",
        f"{_BLOCK}.scale_shift_table",
        "scale_shift_table",
        "caption_projection.linear_1",
        "caption_projection.linear_2",
        "proj_out",
    ),
}

_GATED = (*_PROJECTIONS, "to_gate_logits")

LTX_2: Mapping[str, str] = {
    **LTX,
    "audio_patchify_proj": "audio_proj_in",
    **_time_embedding("audio_adaln_single", "audio_time_embed"),
    **_time_embedding("prompt_adaln_single", "prompt_adaln"),
    **_time_embedding("audio_prompt_adaln_single", "audio_prompt_adaln"),
    **_time_embedding("av_ca_video_scale_shift_adaln_single", "av_cross_attn_video_scale_shift"),
    **_time_embedding("av_ca_audio_scale_shift_adaln_single", "av_cross_attn_audio_scale_shift"),
    **_time_embedding("av_ca_a2v_gate_adaln_single", "av_cross_attn_video_a2v_gate"),
    **_time_embedding("av_ca_v2a_gate_adaln_single", "av_cross_attn_audio_v2a_gate"),
    f"{_BLOCK}.scale_shift_table_a2v_ca_video": f"{_BLOCK}.video_a2v_cross_attn_scale_shift_table",
    f"{_BLOCK}.scale_shift_table_a2v_ca_audio": f"{_BLOCK}.audio_a2v_cross_attn_scale_shift_table",
    **_attention("attn1", _GATED),
    **_attention("attn2", _GATED),
    **_attention("audio_attn1", _GATED),
    **_attention("audio_attn2", _GATED),
    **_attention("audio_to_video_attn", _GATED),
    **_attention("video_to_audio_attn", _GATED),
    **_alike(
        f"{_BLOCK}.audio_ff.net.0.proj",
        f"{_BLOCK}.audio_ff.net.2",
        f"{_BLOCK}.audio_scale_shift_table",
        f"{_BLOCK}.prompt_scale_shift_table",
        f"{_BLOCK}.audio_prompt_scale_shift_table",
        "audio_scale_shift_table",
        "audio_caption_projection.linear_1",
        "audio_caption_projection.linear_2",
        "audio_proj_out",
        "keyframes_abs_pos_embedding",
        *(
            f"{kind}_embeddings_connector.{layer}"  # a part of its own in diffusers
            for kind in ("video", "audio")
            for layer in (
                "learnable_registers",
                *(f"transformer_1d_blocks.{{}}.attn1.{one}" for one in (*_GATED, *_NORMS)),
                "transformer_1d_blocks.{}.ff.net.0.proj",
                "transformer_1d_blocks.{}.ff.net.2",
            )
        ),
    ),
}
"""`prompt_adaln_single` (2.3) is known to the converter of LoRAs alone."""

LTX_STYLE = Names(family="ltx", style="original LTX-Video", table=LTX)
LTX_2_STYLE = Names(family="ltx-2", style="original LTX-2", table=LTX_2)
