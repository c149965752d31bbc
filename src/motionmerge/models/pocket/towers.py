"""The pocket model's text and image towers: CLIP's classes of transformers, in a small size.

As CLIP is for DynamiCrafter, the towers are trained beforehand on something else than video and
then frozen: the text tower to tell what a caption says, the image tower to tell what lies where in
a picture (training/pocket/towers.py).
"""

from __future__ import annotations

import torch
from transformers import CLIPTextConfig, CLIPTextModel, CLIPVisionConfig, CLIPVisionModel

from .language import WORDS
from .text import MAX_TOKENS
from .world import SIZE

WIDTH = 64


def build_text_encoder() -> CLIPTextModel:
    """Build a two-layer CLIP text tower for the fixed vocabulary."""
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(WORDS),
            hidden_size=WIDTH,
            intermediate_size=4 * WIDTH,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=MAX_TOKENS,
            projection_dim=WIDTH,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
        )
    )


def build_image_encoder() -> CLIPVisionModel:
    """Build a two-layer CLIP image tower with 8 x 8 patches and a class token: 65 tokens."""
    return CLIPVisionModel(
        CLIPVisionConfig(
            hidden_size=WIDTH,
            intermediate_size=4 * WIDTH,
            num_hidden_layers=2,
            num_attention_heads=4,
            image_size=SIZE,
            patch_size=8,
            projection_dim=WIDTH,
        )
    )


def normalize_image(image: torch.Tensor) -> torch.Tensor:
    """Prepare `[batch, 3, 64, 64]` in [0, 1] for the image tower."""
    return (image - 0.5) / 0.25
