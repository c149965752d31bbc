"""Train the pocket autoencoder's decoder: where each pixel comes from, learned from rendered clips.

loss = |video - clip| + 0.02 * |flow - true flow| where the source is visible, and a binary
cross-entropy of trust against visibility; objects, their surroundings and what they uncover weigh
more. Latents get noise of random strength, so that the decoder forgives what a denoiser leaves.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from motionmerge.models.pocket.autoencoder import COARSE, LATENT_CHANNELS, PocketAutoencoder
from motionmerge.models.pocket.components import attention_kernel
from motionmerge.models.pocket.world import (
    SIZE,
    TRAINING_PHOTOS,
    Canvases,
    Clips,
    render,
    sample_scene,
)
from motionmerge.training.objective import FunctionObjective
from motionmerge.training.settings import TrainerSettings, TrainingProgress, TrainingResult
from motionmerge.training.trainer import fit

MAX_LATENT_NOISE = 0.15
STILL_SHARE = 0.1  # of the samples, which show the first frame itself


class _Decode(nn.Module):
    """Exposes fields and video of one key frame a clip through `forward`, as wrappers need."""

    def __init__(self, autoencoder: PocketAutoencoder) -> None:
        super().__init__()
        self.autoencoder = autoencoder

    def forward(self, latents: torch.Tensor, image: torch.Tensor) -> tuple[torch.Tensor, ...]:
        fields = self.autoencoder.fields(latents, image)
        video = self.autoencoder.paint(fields, image)
        return fields.flow, fields.trust_logit, video


def decoder_loss(
    decode: nn.Module,
    indices: Sequence[int],
    *,
    autoencoder: PocketAutoencoder,
    seed: int,
    canvases: Canvases,
) -> torch.Tensor:
    """Compute the loss above, on one random moment of each clip.

    Args:
        decode: The (possibly wrapped) decoder that is trained.
        indices: The samples.
        autoencoder: Encodes the clips.
        seed, canvases: What the clips are drawn from.
    """
    scenes, moments, latent_noise = [], [], []
    for index in indices:
        rng = np.random.default_rng((seed, 4, index))
        scenes.append(sample_scene(rng, num_canvases=len(canvases)))
        moments.append((0.0, rng.uniform() if rng.random() > STILL_SHARE else 0.0))
        noise = rng.standard_normal((LATENT_CHANNELS, 1, COARSE // 2, COARSE // 2))
        latent_noise.append(MAX_LATENT_NOISE * rng.random() * noise)
    clips = render(scenes, canvases, np.array(moments))
    image, target, true_flow = clips.video[:, 0], clips.video[:, 1:], clips.flow[:, 1]
    latents = autoencoder.encode(clips.flow[:, 1:]) + torch.tensor(np.stack(latent_noise)).float()
    flow, trust_logit, video = decode(latents, image)
    visible = clips.source_is_visible[:, 1].float()
    # Objects cover three percent of a frame: count them as much as the rest.
    is_near = _near_objects(clips)
    weight = visible * (1 + is_near / is_near.mean((1, 2, 3), keepdim=True).clamp(min=0.01))
    flow_loss = ((flow - true_flow).abs() * weight).mean()
    trust_loss = F.binary_cross_entropy_with_logits(trust_logit, visible)
    pixel_loss = ((video - target).abs() * (1 + 4 * is_near[:, None])).mean()
    return pixel_loss + 0.02 * flow_loss + 0.02 * trust_loss


def _near_objects(clips: Clips) -> torch.Tensor:
    """Return the pixels of objects and of what they uncover, and their neighbours: `[n, 1, h, w]`.

    Where the picture has come in from outside the first frame nothing was uncovered.
    """
    axis = torch.arange(SIZE) + 0.5
    pixels = torch.stack(torch.meshgrid(axis, axis, indexing="xy"))
    source = pixels + clips.flow[:, 1]
    is_inside = ((source > 0) & (source < SIZE)).all(1, keepdim=True)
    is_uncovered = is_inside & ~clips.source_is_visible[:, 1]
    near = (clips.is_object[:, 1] | is_uncovered).float()
    return F.max_pool2d(near, 5, stride=1, padding=2)


def train_decoder(
    folder: Path,
    *,
    settings: TrainerSettings,
    on_progress: Callable[[TrainingProgress], None] | None = None,
) -> tuple[dict[str, torch.Tensor], TrainingResult]:
    """Train the decoder; returns its weights as `autoencoder.*`."""
    torch.manual_seed(settings.seed)
    autoencoder = PocketAutoencoder()
    canvases = Canvases(1000, photos=TRAINING_PHOTOS, rng=np.random.default_rng((settings.seed, 5)))
    result = fit(
        _Decode(autoencoder),
        FunctionObjective(
            lambda m, i: decoder_loss(
                m, i, autoencoder=autoencoder, seed=settings.seed, canvases=canvases
            )
        ),
        settings,
        folder,
        kernels=attention_kernel,
        on_progress=on_progress,
    )
    return {f"autoencoder.{k}": v for k, v in autoencoder.state_dict().items()}, result
