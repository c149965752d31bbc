"""A tiny DynamiCrafter with random weights, built in memory from the real classes."""

from __future__ import annotations

import torch
from diffusers import AutoencoderKL
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import CLIPTextModel, CLIPVisionModel, PreTrainedTokenizerFast

from motionmerge.models.dynamicrafter.encoders import image_encoder_config, text_encoder_config
from motionmerge.models.dynamicrafter.image_projector import ImageProjector
from motionmerge.models.dynamicrafter.official_config import videocrafter_scheduler_config
from motionmerge.models.dynamicrafter.scheduler import DynamicRescaleDDIMScheduler
from motionmerge.models.dynamicrafter.unet import DynamiCrafterUNet
from motionmerge.sampling.pipelines.dynamicrafter import DynamiCrafterPipeline
from motionmerge.sampling.pipelines.videocrafter import VideoCrafterPipeline

WORDS = ["[PAD]", "[UNK]", "the", "camera", "pans", "left", "right", "a", "cat", "jumps", "up"]
NUM_TOKENS, WIDTH, NUM_FRAMES = 6, 16, 3


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {word: index for index, word in enumerate(WORDS)}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        unk_token="[UNK]",
        model_max_length=NUM_TOKENS,
    )


def tiny_unet(in_channels: int = 8) -> DynamiCrafterUNet:
    unet = DynamiCrafterUNet(
        in_channels=in_channels,
        block_out_channels=(8, 16),
        attention_levels=(True, False),
        layers_per_block=1,
        attention_head_dim=4,
        cross_attention_dim=WIDTH,
        num_text_tokens=NUM_TOKENS,
        num_image_tokens=2,
        norm_num_groups=4,
    )
    with torch.no_grad():  # zero-initialised layers would hide the prompt and time
        for parameter in unet.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=parameter[0].numel() ** -0.5)
    return unet.eval()


def tiny_videocrafter() -> VideoCrafterPipeline:
    parts = dict(tiny_pipeline().components)
    own = {**parts["image_projector"].config, "num_frames": 1}
    parts |= {
        "unet": tiny_unet(in_channels=4),
        "image_projector": ImageProjector(**own).eval(),
        "scheduler": DynamicRescaleDDIMScheduler(**videocrafter_scheduler_config({})),
    }
    pipeline = VideoCrafterPipeline(**parts, height=16, width=16)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def tiny_pipeline(seed: int = 0) -> DynamiCrafterPipeline:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        vae = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            block_out_channels=(4, 8),
            norm_num_groups=4,
            scaling_factor=0.18215,
        )
        text = text_encoder_config(
            width=WIDTH, layers=1, heads=2, vocab_size=len(WORDS), num_tokens=NUM_TOKENS
        )
        image = image_encoder_config(width=WIDTH, layers=1, heads=2, patch_size=56)
        projector = ImageProjector(
            embed_dims=WIDTH,
            output_dims=WIDTH,
            hidden_dims=WIDTH,
            depth=1,
            dim_head=4,
            heads=2,
            num_queries=2,
            num_frames=NUM_FRAMES,
        )
        pipeline = DynamiCrafterPipeline(
            unet=tiny_unet(),
            vae=vae.eval(),
            text_encoder=CLIPTextModel(text).eval(),
            tokenizer=tiny_tokenizer(),
            image_encoder=CLIPVisionModel(image).eval(),
            image_projector=projector.eval(),
            scheduler=DynamicRescaleDDIMScheduler(),
            height=16,
            width=16,
        )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
