"""Tiny pipelines with random weights, so that the examples for large models run anywhere.

Their videos are noise; everything else is as with the released models.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers.utils import logging
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
    PreTrainedTokenizerFast,
    UMT5Config,
    UMT5EncoderModel,
)

logging.disable_progress_bar()
SMALL = {"height": 32, "width": 32, "num_frames": 5, "num_inference_steps": 4}


def wan_transformer(in_channels: int = 36) -> Any:
    """16 channels of noise, and for image-to-video 20 more of the image."""
    return diffusers.WanTransformer3DModel(
        in_channels=in_channels,
        num_attention_heads=2,
        attention_head_dim=12,
        text_dim=16,
        freq_dim=16,
        ffn_dim=16,
        num_layers=1,
    )


def wan_2_2() -> Any:
    """Two transformers, changed at noise level 0.9, as in Wan 2.2-A14B."""
    torch.manual_seed(0)
    words = models.WordLevel({"<pad>": 0, "<unk>": 1}, unk_token="<unk>")
    tokenizer = Tokenizer(words)
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    pipeline = diffusers.WanImageToVideoPipeline(
        tokenizer=PreTrainedTokenizerFast(
            tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>"
        ),
        text_encoder=UMT5EncoderModel(
            UMT5Config(vocab_size=2, d_model=16, d_kv=4, d_ff=16, num_layers=1, num_heads=2)
        ),
        transformer=wan_transformer(),
        transformer_2=wan_transformer(),
        vae=diffusers.AutoencoderKLWan(base_dim=3, dim_mult=[1, 1, 1, 1], num_res_blocks=1),
        scheduler=diffusers.UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
        ),
        boundary_ratio=0.9,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def svd() -> Any:
    """Stable Video Diffusion: no text, continuous timesteps."""
    torch.manual_seed(0)
    vision = CLIPVisionConfig(
        hidden_size=8,
        intermediate_size=8,
        projection_dim=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=224,
        patch_size=112,
    )
    pipeline = diffusers.StableVideoDiffusionPipeline(
        unet=diffusers.UNetSpatioTemporalConditionModel(
            block_out_channels=(32, 64),
            layers_per_block=1,
            down_block_types=("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
            up_block_types=("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"),
            num_attention_heads=(2, 4),
            cross_attention_dim=8,
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=24,
        ),
        vae=diffusers.AutoencoderKLTemporalDecoder(
            down_block_types=("DownEncoderBlock2D",) * 2, block_out_channels=(32, 32)
        ),
        image_encoder=CLIPVisionModelWithProjection(vision),
        feature_extractor=CLIPImageProcessor(
            crop_size={"height": 224, "width": 224}, size={"height": 224, "width": 224}
        ),
        scheduler=diffusers.EulerDiscreteScheduler(
            prediction_type="v_prediction", timestep_type="continuous", use_karras_sigmas=True
        ),
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def lora(path: str, seed: int) -> str:
    """Write a LoRA for the last layer of a tiny Wan transformer."""
    torch.manual_seed(seed)
    layer = "diffusion_model.head.head"
    save_file(
        {
            f"{layer}.lora_A.weight": torch.randn(2, 24),
            f"{layer}.lora_B.weight": torch.randn(64, 2),
        },
        path,
    )
    return path


def t2v_parent(folder: str) -> Path:
    """Write a transformer without the image's channels, as text-to-video models have it."""
    torch.manual_seed(1)
    wan_transformer(in_channels=16).save_pretrained(Path(folder) / "transformer")
    return Path(folder)


def moved(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Copy a module's weights and move each of them a little, as fine-tuning does."""
    torch.manual_seed(2)
    return {
        f"unet.{name}": weight + 0.02 * torch.randn_like(weight)
        for name, weight in module.state_dict().items()
    }
