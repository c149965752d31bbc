"""Builders of the image-to-video pipelines that came to diffusers in 2026, in a tiny size."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.attention.flex_attention as flex
from diffusers.guiders import ClassifierFreeGuidance
from transformers import Gemma2Config, Gemma2Model, SiglipVisionConfig, SiglipVisionModel

from . import builders as build
from .builders import TEXT_DIM, WORDS
from .library import d

# AnyFlow's attention as it is: torch would trace it anew for every shape, seconds each, and then
# compute the same.
flex._FLEX_ATTENTION_DISABLE_COMPILE_DEBUG = True


def anyflow() -> Any:
    return d.AnyFlowFARPipeline(
        transformer=d.AnyFlowFARTransformer3DModel(
            **{**build.WAN_SIZE, "in_channels": 16},
            chunk_partition=(1, 1, 1),
            full_chunk_limit=3,
        ),
        vae=build.wan_vae(),
        scheduler=d.FlowMapEulerDiscreteScheduler(shift=5.0),
        **build.wan_text_parts(),
    )


def chronoedit() -> Any:
    return d.ChronoEditPipeline(
        transformer=d.ChronoEditTransformer3DModel(**build.WAN_SIZE, image_dim=8),
        vae=build.wan_vae(),
        image_encoder=build.CLIPVisionModelWithProjection(build.vision_config(32)),
        image_processor=build.image_processor(32),
        scheduler=d.FlowMatchEulerDiscreteScheduler(shift=7.0),
        **build.text_parts(),
    )


def skyreels_v2_df() -> Any:
    return d.SkyReelsV2DiffusionForcingImageToVideoPipeline(
        transformer=d.SkyReelsV2Transformer3DModel(**{**build.WAN_SIZE, "in_channels": 16}),
        vae=build.wan_vae(),
        scheduler=build.flow_unipc(5.0),
        **build.wan_text_parts(),
    )


class NoGuardrail:
    """In place of the classifiers that Cosmos insists on, which are a package of their own."""

    dtype, device = torch.float32, torch.device("cpu")

    def __init__(self) -> None:
        self.config: dict[str, Any] = {}

    def to(self, *_: Any) -> NoGuardrail:
        return self

    def check_text_safety(self, prompt: str) -> bool:
        return bool(prompt)

    def check_video_safety(self, video: Any) -> Any:
        return video


def cosmos_2() -> Any:
    return d.Cosmos2VideoToWorldPipeline(
        transformer=d.CosmosTransformer3DModel(
            in_channels=17,
            out_channels=16,
            num_attention_heads=2,
            attention_head_dim=16,
            num_layers=1,
            mlp_ratio=2,
            text_embed_dim=TEXT_DIM,
            adaln_lora_dim=4,
            max_size=(4, 32, 32),
            rope_scale=(2.0, 1.0, 1.0),
            concat_padding_mask=False,
            extra_pos_embed_type="learnable",
        ),
        vae=build.wan_vae(),
        scheduler=d.FlowMatchEulerDiscreteScheduler(use_karras_sigmas=True),
        safety_checker=NoGuardrail(),
        **build.text_parts(),
    )


HELIOS_SIZE: dict[str, Any] = {
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "text_dim": TEXT_DIM,
    "freq_dim": 16,
    "ffn_dim": 16,
    "num_layers": 1,
    "rope_dim": (4, 4, 4),
}


def helios() -> Any:
    return d.HeliosPipeline(
        transformer=d.HeliosTransformer3DModel(**HELIOS_SIZE),
        vae=build.wan_vae(),
        scheduler=d.HeliosScheduler(stage_range=[0, 1], stages=1, use_dynamic_shifting=True),
        **build.wan_text_parts(),
    )


def siglip() -> SiglipVisionModel:
    size = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    return SiglipVisionModel(
        SiglipVisionConfig(**size, num_attention_heads=2, image_size=16, patch_size=8)
    )


def framepack() -> Any:
    return d.HunyuanVideoFramepackPipeline(
        transformer=d.HunyuanVideoFramepackTransformer3DModel(
            in_channels=4,
            out_channels=4,
            num_attention_heads=2,
            attention_head_dim=10,
            num_layers=1,
            num_single_layers=1,
            num_refiner_layers=1,
            text_embed_dim=TEXT_DIM,
            pooled_projection_dim=8,
            rope_axes_dim=(2, 4, 4),
            guidance_embeds=False,
            image_condition_type=None,
            has_image_proj=True,
            image_proj_dim=8,
            has_clean_x_embedder=True,
        ),
        vae=d.AutoencoderKLHunyuanVideo(
            latent_channels=4, block_out_channels=(8,) * 4, layers_per_block=1, norm_num_groups=4
        ),
        image_encoder=siglip(),
        feature_extractor=build.SiglipImageProcessor(size={"height": 16, "width": 16}),
        scheduler=d.FlowMatchEulerDiscreteScheduler(shift=7.0),
        **dict.fromkeys(("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")),
    )


def motif() -> Any:
    return d.MotifVideoImage2VideoPipeline(
        transformer=d.MotifVideoTransformer3DModel(
            num_attention_heads=2,
            attention_head_dim=12,
            num_layers=1,
            num_single_layers=1,
            mlp_ratio=1.0,
            text_embed_dim=TEXT_DIM,
            rope_axes_dim=(4, 4, 4),
        ),
        vae=build.wan_vae(),
        guider=ClassifierFreeGuidance(guidance_scale=4.0),
        scheduler=d.FlowMatchEulerDiscreteScheduler(shift=7.0),
        **dict.fromkeys(("text_encoder", "tokenizer", "feature_extractor")),
    )


def sana_video() -> Any:
    gemma = Gemma2Config(
        vocab_size=len(WORDS),
        hidden_size=TEXT_DIM,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
    )
    return d.SanaImageToVideoPipeline(
        transformer=d.SanaVideoTransformer3DModel(
            in_channels=16,
            out_channels=16,
            num_attention_heads=2,
            attention_head_dim=12,
            num_layers=1,
            num_cross_attention_heads=2,
            cross_attention_head_dim=12,
            cross_attention_dim=24,
            caption_channels=TEXT_DIM,
            sample_size=8,
            rope_max_seq_len=32,
            qk_norm="rms_norm_across_heads",
        ),
        vae=build.wan_vae(),
        text_encoder=Gemma2Model(gemma),
        tokenizer=build.tokenizer(),
        scheduler=d.FlowMatchEulerDiscreteScheduler(shift=7.0),
    )


def kandinsky_6() -> Any:
    return d.Kandinsky6TI2VAPipeline(
        transformer=d.Kandinsky6Transformer3DModel(
            in_visual_dim=4,
            out_visual_dim=4,
            in_text_dim=TEXT_DIM,
            in_text_dim2=8,
            time_dim=8,
            model_dim=16,
            ff_dim=16,
            num_text_blocks=1,
            num_visual_blocks=1,
            axes_dims=(2, 2, 4),
            in_audio_dim=4,
            out_audio_dim=4,
            visual_token_type_num_embeddings=2,
        ),
        vae=d.AutoencoderKLHunyuanVideo(
            latent_channels=4, block_out_channels=(8,) * 4, layers_per_block=1, norm_num_groups=4
        ),
        scheduler=d.FlowMatchEulerDiscreteScheduler(shift=7.0),
        **dict.fromkeys(
            ("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2", "audio_vae", "vocoder")
        ),
    )
