"""What a pipeline of diffusers makes of a view of a clip, before or while its denoiser is trained.

Text, image and all else are encoded by the pipeline itself, see `encode_condition`; the clip by its
autoencoder. The image is the first frame of the view, as the pipelines take it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from motionmerge.io.decoding import Picture
from motionmerge.models.video_pipeline import VideoPipeline
from motionmerge.rng import whole_number_for
from motionmerge.sampling.request.folder import PipelineFolder

from .clip_encoder import Blanks, EncodedView
from .denoisers.clean_latents import LatentScale, clip_moments, latent_scale
from .denoisers.encoding import encode_condition
from .denoisers.family import FamilyDenoiser
from .run_state import weights_hash
from .views import ClipView, ViewSettings, whole_frame_rate

DROPS_IMAGE = ("dynamicrafter", "svd", "i2vgen-xl")
"""Families whose guidance compares with a video that is not of the image."""

SHOWS_PLAIN_LATENTS = ("dynamicrafter", "svd")
"""Families that are shown the image's latents and nothing else beside the noisy ones."""

_DROPS_LATENTS = ("svd",)


class FamilyEncoder:
    """The frozen parts of a pipeline of diffusers.

    Args:
        pipeline: It is run up to the first call of its denoiser.
        denoiser: Of the pipeline.
        folder: Of the pipeline.
        settings: Of the views, of which blanks have the size.
    """

    def __init__(
        self,
        pipeline: VideoPipeline,
        denoiser: FamilyDenoiser,
        *,
        folder: PipelineFolder,
        settings: ViewSettings,
    ) -> None:
        self.pipeline, self.denoiser, self.vae = pipeline, denoiser, pipeline.components["vae"]
        self._folder, self._settings = folder, settings
        self._blanks: Blanks | None = None

    @property
    def made_with(self) -> Mapping[str, str]:
        # The folder does not have a text tower that was added.
        tower = self.pipeline.components.get("text_encoder")
        index = self._folder.configs[""]
        settings = {name: value for name, value in index.items() if not isinstance(value, list)}
        return {
            "parts": self._folder.hash_parts(),
            "settings": json.dumps(settings, sort_keys=True),
            "text_encoder": "none" if tower is None else weights_hash(tower),
        }

    def to(self, device: torch.device) -> None:
        trained = set(map(id, self.denoiser.children()))
        for part in self.pipeline.components.values():
            if isinstance(part, nn.Module) and id(part) not in trained:
                part.to(device)

    def encode(
        self, view: ClipView, frames: Picture, *, condition_frames: Sequence[int]
    ) -> EncodedView:
        assert tuple(condition_frames) == (0,)  # refused by `check_model`
        where = (view.shot.clip.clip, *map(str, view.indices), *map(str, view.size))
        return self._encoded(
            frames,
            view.shot.clip.caption,
            frame_rate=whole_frame_rate(view),
            seed=whole_number_for(0, "condition", *where),
        )

    def blanks(self) -> Blanks:
        if self._blanks is None:
            # What stands for text and image tokens is the same at any length.
            num_frames = self._folder.limits.nearest_num_frames(1)
            black = np.zeros((num_frames, *self._settings.sizes[0], 3), np.uint8)
            empty = self._encoded(black, "", frame_rate=8.0, seed=0)
            drops_latents = self._folder.family.name in _DROPS_LATENTS
            self._blanks = Blanks(
                empty.prompt_embeds,
                torch.zeros_like(empty.image_embeds[0]),
                more=empty.more,
                shown=torch.zeros(1, 1, 1, 1) if drops_latents else None,
            )
        return self._blanks

    @property
    def rate_of(self) -> Callable[[ClipView], float]:
        return _rate_less_one if self._folder.family.name == "svd" else whole_frame_rate

    @property
    def latent_scale(self) -> LatentScale:
        return latent_scale(self.vae)

    @property
    def token_shape(self) -> tuple[int, int]:
        tokens, width = self.blanks().image_embeds.shape
        return tokens, width

    def _encoded(
        self, frames: Picture, caption: str, *, frame_rate: float, seed: int
    ) -> EncodedView:
        condition = encode_condition(
            self.pipeline, self.denoiser, frames, caption, frame_rate=frame_rate, seed=seed
        )
        kept: dict[str, Any] = {
            name: getattr(condition, name)[0].cpu() for name in ("prompt_embeds", "latents")
        }
        return EncodedView(
            moments=clip_moments(self.vae, frames)[0].transpose(0, 1),
            prompt_embeds=kept["prompt_embeds"],
            image_embeds=condition.image_embeds.cpu(),
            shown=kept["latents"],
            more={name: value[0].cpu() for name, value in condition.more.items()},
        )


def _rate_less_one(view: ClipView) -> float:
    """Return a view's frames per second as SVD is told them."""
    return whole_frame_rate(view) - 1
