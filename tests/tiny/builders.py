"""Builders of diffusers' image-to-video pipelines in a tiny size, with random weights, in memory.

Every model is of the real class and as small as its configuration allows.
"""

from __future__ import annotations

from typing import Any

from diffusers.guiders import ClassifierFreeGuidance
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    CLIPVisionModel,
    CLIPVisionModelWithProjection,
    PreTrainedTokenizerFast,
    SiglipImageProcessor,
    SiglipVisionConfig,
    SiglipVisionModel,
    T5Config,
    T5EncoderModel,
    UMT5Config,
    UMT5EncoderModel,
)

from .library import d, ltx2

WORDS = ["[PAD]", "[UNK]", "</s>", "the", "camera", "pans", "left", "a", "cat", "jumps"]
TEXT_DIM = 16


def tokenizer() -> PreTrainedTokenizerFast:
    model = Tokenizer(WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    model.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=model,
        pad_token="[PAD]",
        unk_token="[UNK]",
        eos_token="</s>",
        model_max_length=16,
    )


T5_SIZE = {
    "vocab_size": len(WORDS),
    "d_model": TEXT_DIM,
    "d_kv": 4,
    "d_ff": 16,
    "num_layers": 1,
    "num_heads": 2,
}


def text_parts() -> dict[str, Any]:
    return {"tokenizer": tokenizer(), "text_encoder": T5EncoderModel(T5Config(**T5_SIZE))}


def wan_text_parts() -> dict[str, Any]:
    return {"tokenizer": tokenizer(), "text_encoder": UMT5EncoderModel(UMT5Config(**T5_SIZE))}


def vision_config(side: int) -> CLIPVisionConfig:
    return CLIPVisionConfig(
        hidden_size=8,
        intermediate_size=8,
        projection_dim=8,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=side,
        patch_size=side // 2,
    )


def image_processor(side: int) -> CLIPImageProcessor:
    size = {"height": side, "width": side}
    return CLIPImageProcessor(crop_size=size, size=size)


def svd() -> Any:
    return d.StableVideoDiffusionPipeline(
        unet=d.UNetSpatioTemporalConditionModel(
            block_out_channels=(32, 64),
            layers_per_block=1,
            down_block_types=("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
            up_block_types=("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"),
            num_attention_heads=(2, 4),
            cross_attention_dim=8,
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=24,
        ),
        vae=d.AutoencoderKLTemporalDecoder(
            down_block_types=("DownEncoderBlock2D",) * 2, block_out_channels=(32, 32)
        ),
        image_encoder=CLIPVisionModelWithProjection(vision_config(224)),
        feature_extractor=image_processor(224),
        scheduler=d.EulerDiscreteScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            prediction_type="v_prediction",
            timestep_type="continuous",
            timestep_spacing="leading",
            use_karras_sigmas=True,
            sigma_min=0.002,
            sigma_max=700.0,
        ),
    )


def i2vgen_xl() -> Any:
    return d.I2VGenXLPipeline(
        unet=d.I2VGenXLUNet(
            block_out_channels=(4, 8),
            layers_per_block=1,
            norm_num_groups=2,
            down_block_types=("CrossAttnDownBlock3D", "DownBlock3D"),
            up_block_types=("UpBlock3D", "CrossAttnUpBlock3D"),
            cross_attention_dim=8,
            attention_head_dim=4,
        ),
        vae=d.AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            block_out_channels=(8, 8),
            norm_num_groups=2,
        ),
        text_encoder=None,  # its `clip_skip` needs a transformers before 5.6
        tokenizer=None,
        image_encoder=CLIPVisionModelWithProjection(vision_config(32)),
        feature_extractor=image_processor(32),
        scheduler=d.DDIMScheduler(clip_sample=False, set_alpha_to_one=False),
    )


def cogvideox(num_tokens: int = 8) -> Any:
    return d.CogVideoXImageToVideoPipeline(
        transformer=d.CogVideoXTransformer3DModel(
            num_attention_heads=2,
            attention_head_dim=16,
            in_channels=8,
            out_channels=4,
            time_embed_dim=4,
            text_embed_dim=TEXT_DIM,
            num_layers=1,
            sample_width=2,
            sample_height=2,
            sample_frames=9,
            max_text_seq_length=num_tokens,
            use_rotary_positional_embeddings=True,
            use_learned_positional_embeddings=True,
        ),
        vae=d.AutoencoderKLCogVideoX(
            block_out_channels=(4,) * 4, latent_channels=4, layers_per_block=1, norm_num_groups=2
        ),
        scheduler=d.CogVideoXDDIMScheduler(),
        **text_parts(),
    )


def wan_transformer(**more: Any) -> d.WanTransformer3DModel:
    return d.WanTransformer3DModel(**{**WAN_SIZE, **more})


WAN_SIZE: dict[str, Any] = {
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "in_channels": 36,
    "out_channels": 16,
    "text_dim": TEXT_DIM,
    "freq_dim": 16,
    "ffn_dim": 16,
    "num_layers": 1,
    "rope_max_seq_len": 32,
}


def wan_vae(**more: Any) -> d.AutoencoderKLWan:
    return d.AutoencoderKLWan(
        **{"base_dim": 3, "dim_mult": [1, 1, 1, 1], "num_res_blocks": 1, **more}
    )


def flow_unipc(shift: float) -> d.UniPCMultistepScheduler:
    return d.UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift
    )


def wan_2_1() -> Any:
    return d.WanImageToVideoPipeline(
        transformer=wan_transformer(image_dim=8),
        vae=wan_vae(),
        image_encoder=CLIPVisionModel(vision_config(32)),
        image_processor=image_processor(32),
        scheduler=d.FlowMatchEulerDiscreteScheduler(shift=7.0),
        **wan_text_parts(),
    )


def wan_2_2_a14b() -> Any:
    return d.WanImageToVideoPipeline(
        transformer=wan_transformer(),
        transformer_2=wan_transformer(),
        vae=wan_vae(),
        scheduler=flow_unipc(3.0),
        boundary_ratio=0.9,
        **wan_text_parts(),
    )


def wan_2_2_5b() -> Any:
    return d.WanImageToVideoPipeline(
        transformer=wan_transformer(in_channels=48, out_channels=48),
        vae=wan_vae(
            z_dim=48,
            in_channels=12,
            out_channels=12,
            is_residual=True,
            patch_size=2,
            latents_mean=[0.0] * 48,
            latents_std=[1.0] * 48,
            scale_factor_spatial=16,
        ),
        scheduler=flow_unipc(3.0),
        expand_timesteps=True,
        **wan_text_parts(),
    )


def skyreels_v2() -> Any:
    return d.SkyReelsV2ImageToVideoPipeline(
        transformer=d.SkyReelsV2Transformer3DModel(**WAN_SIZE, image_dim=8),
        vae=wan_vae(),
        image_encoder=CLIPVisionModelWithProjection(vision_config(32)),
        image_processor=image_processor(32),
        scheduler=flow_unipc(5.0),
        **wan_text_parts(),
    )


def ltx() -> Any:
    vae = d.AutoencoderKLLTXVideo(
        latent_channels=8,
        block_out_channels=(8,) * 4,
        decoder_block_out_channels=(8,) * 4,
        layers_per_block=(1,) * 5,
        decoder_layers_per_block=(1,) * 5,
        spatio_temporal_scaling=(True, True, False, False),
        decoder_spatio_temporal_scaling=(True, True, False, False),
        patch_size=1,
    )
    return d.LTXImageToVideoPipeline(
        transformer=d.LTXVideoTransformer3DModel(
            in_channels=8,
            out_channels=8,
            num_attention_heads=2,
            attention_head_dim=8,
            cross_attention_dim=16,
            num_layers=1,
            caption_channels=TEXT_DIM,
        ),
        vae=vae,
        scheduler=d.FlowMatchEulerDiscreteScheduler(),
        **text_parts(),
    )


def ltx_2() -> Any:
    connector = {
        "num_attention_heads": 2,
        "attention_head_dim": 8,
        "num_layers": 1,
        "num_learnable_registers": None,
    }
    connectors = {
        f"{kind}_connector_{key}": value
        for kind in ("video", "audio")
        for key, value in connector.items()
    }
    return d.LTX2ImageToVideoPipeline(
        transformer=d.LTX2VideoTransformer3DModel(
            in_channels=4,
            out_channels=4,
            num_attention_heads=2,
            attention_head_dim=8,
            cross_attention_dim=16,
            audio_in_channels=4,
            audio_out_channels=4,
            audio_num_attention_heads=2,
            audio_attention_head_dim=4,
            audio_cross_attention_dim=8,
            num_layers=1,
            caption_channels=TEXT_DIM,
            rope_double_precision=False,
        ),
        connectors=ltx2.LTX2TextConnectors(
            caption_channels=TEXT_DIM,
            text_proj_in_factor=2,
            connector_rope_base_seq_len=32,
            rope_theta=10000.0,
            rope_double_precision=False,
            causal_temporal_positioning=False,
            **connectors,
        ),
        vae=d.AutoencoderKLLTX2Video(
            latent_channels=4,
            block_out_channels=(8,),
            decoder_block_out_channels=(8,),
            layers_per_block=(1,),
            decoder_layers_per_block=(1, 1),
            spatio_temporal_scaling=(True,),
            decoder_spatio_temporal_scaling=(True,),
            decoder_inject_noise=(False, False),
            downsample_type=("spatial",),
            upsample_residual=(False,),
            upsample_factor=(1,),
            patch_size=1,
        ),
        audio_vae=d.AutoencoderKLLTX2Audio(
            base_channels=4,
            ch_mult=(1,),
            num_res_blocks=1,
            resolution=32,
            latent_channels=2,
            mel_bins=8,
        ),
        vocoder=ltx2.LTX2Vocoder(
            in_channels=16,
            hidden_channels=8,
            upsample_kernel_sizes=[4],
            upsample_factors=[2],
            resnet_kernel_sizes=[3],
            resnet_dilations=[[1]],
        ),
        text_encoder=None,
        tokenizer=None,
        scheduler=d.FlowMatchEulerDiscreteScheduler(),
    )


def hunyuan() -> Any:
    return d.HunyuanVideoImageToVideoPipeline(
        transformer=d.HunyuanVideoTransformer3DModel(
            in_channels=9,
            out_channels=4,
            num_attention_heads=2,
            attention_head_dim=10,
            num_layers=1,
            num_single_layers=1,
            num_refiner_layers=1,
            patch_size=1,
            guidance_embeds=False,
            text_embed_dim=TEXT_DIM,
            pooled_projection_dim=8,
            rope_axes_dim=(2, 4, 4),
            image_condition_type="latent_concat",
        ),
        vae=d.AutoencoderKLHunyuanVideo(
            latent_channels=4, block_out_channels=(8,) * 4, layers_per_block=1, norm_num_groups=4
        ),
        scheduler=d.FlowMatchEulerDiscreteScheduler(shift=7.0),
        **dict.fromkeys(
            ("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2", "image_processor")
        ),
    )


def hunyuan_1_5() -> Any:
    size = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    return d.HunyuanVideo15ImageToVideoPipeline(
        transformer=d.HunyuanVideo15Transformer3DModel(
            in_channels=9,
            out_channels=4,
            num_attention_heads=2,
            attention_head_dim=8,
            num_layers=1,
            num_refiner_layers=1,
            mlp_ratio=2.0,
            text_embed_dim=TEXT_DIM,
            text_embed_2_dim=TEXT_DIM,
            image_embed_dim=8,
            rope_axes_dim=(2, 2, 4),
            target_size=16,
            task_type="i2v",
        ),
        vae=d.AutoencoderKLHunyuanVideo15(
            latent_channels=4,
            block_out_channels=(16, 16),
            layers_per_block=1,
            spatial_compression_ratio=4,
            temporal_compression_ratio=2,
            downsample_match_channel=False,
            upsample_match_channel=False,
        ),
        image_encoder=SiglipVisionModel(
            SiglipVisionConfig(**size, num_attention_heads=2, image_size=16, patch_size=8)
        ),
        feature_extractor=SiglipImageProcessor(size={"height": 16, "width": 16}),
        guider=ClassifierFreeGuidance(guidance_scale=4.0),
        scheduler=d.FlowMatchEulerDiscreteScheduler(shift=7.0),
        **dict.fromkeys(("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")),
    )


def kandinsky_5() -> Any:
    return d.Kandinsky5I2VPipeline(
        transformer=d.Kandinsky5Transformer3DModel(
            in_visual_dim=4,
            out_visual_dim=4,
            in_text_dim=TEXT_DIM,
            in_text_dim2=8,
            time_dim=8,
            patch_size=(1, 2, 2),
            model_dim=16,
            ff_dim=16,
            num_text_blocks=1,
            num_visual_blocks=1,
            axes_dims=(2, 2, 4),
            visual_cond=True,
            attention_type="regular",
        ),
        vae=d.AutoencoderKLHunyuanVideo(
            latent_channels=4, block_out_channels=(8,) * 4, layers_per_block=1, norm_num_groups=4
        ),
        scheduler=d.FlowMatchEulerDiscreteScheduler(shift=7.0),
        **dict.fromkeys(("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")),
    )
