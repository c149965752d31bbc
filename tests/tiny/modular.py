"""Builders of diffusers' modular image-to-video pipelines in a tiny size, with random weights."""

from __future__ import annotations

from typing import Any

from transformers import Gemma3TextConfig, Gemma3TextModel

from . import builders as build
from . import newer as tiny_newer
from .builders import TEXT_DIM, WORDS
from .library import d


def modular(kind: Any, **parts: Any) -> Any:
    """Assemble a modular pipeline of its default blocks."""
    pipeline = kind()
    pipeline.update_components(**parts)
    return pipeline


def wan_2_2() -> Any:
    return modular(
        d.Wan22Image2VideoModularPipeline,
        transformer=build.wan_transformer(),
        transformer_2=build.wan_transformer(),
        vae=build.wan_vae(),
        scheduler=build.flow_unipc(3.0),
        **build.wan_text_parts(),
    )


def wan_2_1() -> Any:
    return modular(
        d.WanImage2VideoModularPipeline,
        transformer=build.wan_transformer(image_dim=8),
        vae=build.wan_vae(),
        image_encoder=build.CLIPVisionModel(build.vision_config(32)),
        image_processor=build.image_processor(32),
        scheduler=build.flow_unipc(3.0),
        **build.wan_text_parts(),
    )


def ltx() -> Any:
    return modular(d.LTXModularPipeline, **build.ltx().components)


def gemma() -> Gemma3TextModel:
    return Gemma3TextModel(
        Gemma3TextConfig(
            vocab_size=len(WORDS),
            hidden_size=TEXT_DIM,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=8,
        )
    )


def ltx_2_parts() -> dict[str, Any]:
    """Parts with a VAE that shrinks a side by 8, not by 2 as the other tiny one, for time."""
    parts = build.ltx_2().components
    config = {k: v for k, v in parts["vae"].config.items() if not k.startswith("_")}
    parts |= {
        "vae": d.AutoencoderKLLTX2Video(**{**config, "patch_size": 4}),
        "text_encoder": gemma(),
        "tokenizer": build.tokenizer(),
    }
    return {name: part for name, part in parts.items() if part is not None}


def ltx_2() -> Any:
    return modular(d.LTX2ModularPipeline, **ltx_2_parts())


def ltx_2_5() -> Any:
    decoder = d.LTX2VideoDiffusionDecoderModel(
        out_channels=3,
        latent_channels=4,
        patch_size=2,
        decoder_head_dim=8,
        decoder_stage_channels=(16, 8, 8),
        decoder_stage_depths=(1, 1, 1),
        decoder_stage_kernels=((3, 3, 3), (3, 3, 3)),
        decoder_upsample_strides=((2, 2, 2), (1, 2, 2)),
        decoder_upsample_channel_reductions=(2, 1),
        decoder_stage5_kernel=(3, 3, 3),
        decoder_t_emb_dim=8,
        spatial_compression_ratio=8,
        temporal_compression_ratio=2,
    )
    return modular(d.LTX25ModularPipeline, diffusion_decoder=decoder, **ltx_2_parts())


def hunyuan_1_5() -> Any:
    """Without its text encoders, whose prompts have a thousand tokens."""
    blocks = d.HunyuanVideo15AutoBlocks()
    del blocks.sub_blocks["text_encoder"]
    pipeline = blocks.init_pipeline()
    pipeline.update_components(
        **{n: p for n, p in build.hunyuan_1_5().components.items() if p is not None}
    )
    return pipeline


def helios() -> Any:
    return modular(d.HeliosModularPipeline, **tiny_newer.helios().components)


def minimax_h3() -> Any:
    """Without its text encoder, whose processor needs torchvision."""
    blocks = d.MiniMaxH3Blocks().get_workflow("fl2va")
    del blocks.sub_blocks["text_encoder"]
    pipeline = blocks.init_pipeline()
    pipeline.update_components(
        transformer=d.MiniMaxH3Transformer3DModel(
            num_attention_heads=2,
            attention_head_dim=16,
            hidden_size=24,
            num_layers=1,
            num_refiner_layers=1,
            ffn_dim=16,
            in_channels=4,
            audio_in_channels=8,
            text_dim=8,
            freq_dim=8,
            time_embed_hidden_dim=16,
            time_embed_dim=16,
            rope_freq_dim=2,
        ),
        vae=d.AutoencoderKLMiniMaxH3(
            latent_channels=4,
            block_out_channels=(8, 8),
            layers_per_block=1,
            spatial_downsample_factors=(2, 2),
            temporal_downsample_factors=(2, 2),
            norm_num_groups=8,
            decoder_num_layers=1,
            decoder_num_attention_heads=2,
            decoder_attention_head_dim=8,
            decoder_num_register_tokens=2,
            decoder_ffn_mult=2,
            latents_mean=(0.0,) * 4,
            latents_std=(1.0,) * 4,
        ),
        audio_vae=d.AutoencoderKLMiniMaxH3Audio(
            encoder_dim=4,
            encoder_rates=(2, 2),
            latent_dim=32,
            latent_channels=8,
            num_attention_heads=2,
            decoder_dim=16,
            decoder_rates=(2, 2),
            decoder_kernel_sizes=(4, 4),
            resblock_kernel_sizes=(3,),
            resblock_dilation_sizes=((1, 3),),
            latents_mean=[0.0] * 8,
            latents_std=[1.0] * 8,
        ),
        scheduler=d.MiniMaxH3Scheduler(shift=12.0),
        audio_scheduler=d.MiniMaxH3Scheduler(shift=3.0),
    )
    return pipeline
