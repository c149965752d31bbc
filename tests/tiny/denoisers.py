"""Tiny denoisers of diffusers, one for each way of naming, with random weights."""

from __future__ import annotations

from collections.abc import Callable

import torch

from .library import d, of_its_time

_WAN = {
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "in_channels": 4,
    "out_channels": 4,
    "text_dim": 16,
    "freq_dim": 16,
    "ffn_dim": 16,
    "num_layers": 2,
}
_WAN_IMAGE = {"image_dim": 8, "added_kv_proj_dim": 24, "pos_embed_seq_len": 4}
_HUNYUAN = {
    "in_channels": 4,
    "out_channels": 4,
    "num_attention_heads": 2,
    "attention_head_dim": 10,
    "num_layers": 2,
    "num_single_layers": 2,
    "num_refiner_layers": 2,
    "mlp_ratio": 2.0,
    "patch_size": 1,
    "text_embed_dim": 16,
    "pooled_projection_dim": 8,
    "rope_axes_dim": (2, 4, 4),
}
_LTX_2 = {
    "in_channels": 4,
    "out_channels": 4,
    "num_attention_heads": 2,
    "attention_head_dim": 8,
    "cross_attention_dim": 16,
    "audio_in_channels": 4,
    "audio_out_channels": 4,
    "audio_num_attention_heads": 2,
    "audio_attention_head_dim": 4,
    "audio_cross_attention_dim": 8,
    "num_layers": 2,
    "caption_channels": 16,
    "rope_double_precision": False,
}
_COSMOS = {
    "in_channels": 4,
    "out_channels": 4,
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "num_layers": 2,
    "mlp_ratio": 2,
    "text_embed_dim": 8,
    "adaln_lora_dim": 4,
    "max_size": (4, 8, 8),
}


def _hunyuan_video_15() -> torch.nn.Module:
    """Build HunyuanVideo 1.5, whose glyph projection is 2048 wide whatever the configuration."""
    model = d.HunyuanVideo15Transformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=2,
        num_refiner_layers=1,
        text_embed_dim=8,
        text_embed_2_dim=8,
        image_embed_dim=8,
        rope_axes_dim=(2, 2, 4),
        use_meanflow=True,
    )
    for layer, (inner, outer) in {"1": (8, 12), "2": (12, 12), "3": (12, 16)}.items():
        setattr(model.context_embedder_2, f"linear_{layer}", torch.nn.Linear(inner, outer))
    return model


_BUILDERS: dict[str, Callable[[], torch.nn.Module]] = {
    "wan": lambda: d.WanTransformer3DModel(**_WAN, **_WAN_IMAGE),
    "wan text": lambda: d.WanTransformer3DModel(**_WAN),
    "skyreels-v2": lambda: d.SkyReelsV2Transformer3DModel(
        **_WAN, **_WAN_IMAGE, inject_sample_info=True
    ),
    "chronoedit": lambda: d.ChronoEditTransformer3DModel(**_WAN, image_dim=8, added_kv_proj_dim=24),
    "vace": lambda: d.WanVACETransformer3DModel(**_WAN, vace_layers=[0], vace_in_channels=4),
    "animate": lambda: d.WanAnimateTransformer3DModel(
        **{**_WAN, "in_channels": 12, "num_layers": 5},
        latent_channels=4,
        image_dim=8,
        added_kv_proj_dim=24,
        motion_encoder_channel_sizes={str(2**n): 8 for n in range(2, 10)},
        motion_style_dim=8,
        motion_dim=4,
        motion_encoder_dim=8,
        face_encoder_hidden_dim=16,
        face_encoder_num_heads=2,
    ),
    "animate-2": lambda: d.WanAnimate2Transformer3DModel(
        in_dim=4, dim=24, ffn_dim=16, freq_dim=8, text_dim=8, out_dim=4, num_heads=2, num_layers=2
    ),
    "hunyuan-video": lambda: d.HunyuanVideoTransformer3DModel(**_HUNYUAN),
    "hunyuan-video-1.5": lambda: _hunyuan_video_15(),
    "ltx": lambda: d.LTXVideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=8,
        cross_attention_dim=16,
        num_layers=2,
        caption_channels=8,
    ),
    "ltx-2": lambda: d.LTX2VideoTransformer3DModel(**_LTX_2),
    "ltx-2.3": lambda: d.LTX2VideoTransformer3DModel(
        **_LTX_2,
        gated_attn=True,
        cross_attn_mod=True,
        audio_gated_attn=True,
        audio_cross_attn_mod=True,
        use_keyframes_abs_pos_embedding=True,
    ),
    "cosmos": lambda: d.CosmosTransformer3DModel(**_COSMOS),
    "cosmos-2": lambda: d.CosmosTransformer3DModel(
        **_COSMOS,
        extra_pos_embed_type=None,
        use_crossattn_projection=True,
        crossattn_proj_in_channels=8,
        encoder_hidden_states_channels=8,
        img_context_dim_in=8,
    ),
    "cogvideox": lambda: d.CogVideoXTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=4,
        time_embed_dim=2,
        ofs_embed_dim=2,
        text_embed_dim=8,
        num_layers=2,
        sample_width=8,
        sample_height=8,
        sample_frames=9,
        use_rotary_positional_embeddings=True,
        use_learned_positional_embeddings=True,
    ),
    "kandinsky-5": lambda: d.Kandinsky5Transformer3DModel(
        in_visual_dim=4,
        in_text_dim=8,
        in_text_dim2=8,
        time_dim=8,
        out_visual_dim=4,
        model_dim=16,
        ff_dim=16,
        num_text_blocks=1,
        num_visual_blocks=2,
        axes_dims=(2, 2, 4),
    ),
    "minimax-h3": lambda: d.MiniMaxH3Transformer3DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        hidden_size=24,
        num_layers=2,
        num_refiner_layers=2,
        ffn_dim=16,
        in_channels=4,
        audio_in_channels=4,
        text_dim=8,
        freq_dim=8,
        time_embed_hidden_dim=8,
        time_embed_dim=8,
        rope_freq_dim=4,
    ),
}
DENOISERS = {kind: of_its_time(build) for kind, build in _BUILDERS.items()}


def state_of(kind: str) -> dict[str, torch.Tensor]:
    """Build a denoiser and return its tensors, all of them random."""
    generator = torch.Generator().manual_seed(0)
    state = DENOISERS[kind]().state_dict()
    return {name: torch.randn(tensor.shape, generator=generator) for name, tensor in state.items()}


def tiny_image_wan(seed: int) -> d.WanTransformer3DModel:
    """Build the denoiser of a Wan 2.2 image-to-video pipeline; `seed` draws its weights."""
    torch.manual_seed(seed)
    return d.WanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=12, in_channels=36, out_channels=16,
        text_dim=8, freq_dim=16, ffn_dim=16, num_layers=2,
    )  # fmt: skip
