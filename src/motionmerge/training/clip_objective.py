"""What a denoiser learns from clips: the whole training step of its family, but the optimizer.

    draw      sample index -> view, noise, time, what is dropped          (`ClipDrawing`)
    prepare   noised latents and the condition, on the device
    loss      mean over samples of the denoiser's weighted squared error

DynamiCrafter's is that of its official code: `lvdm/models/ddpm3d.py`; TimeNoise that of CIL's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import deepcopy
from typing import Any, Literal

import torch
from accelerate.utils import send_to_device
from torch import nn

from .clip_batches import ClipBatch, ClipDrawing, ConditionNoise, ReadView
from .clip_encoder import ClipEncoder
from .denoisers.condition import DenoiserCondition, every_frame, first_and_last
from .objective import Drawn, needs_gradients
from .objectives.noised import Noised, NoiseProcess, denoising_losses
from .objectives.vp import VariancePreserving

Layout = Literal["every frame", "first and last"]
"""Where the denoiser is shown the image's latents."""


class ClipObjective:
    """An `Objective` on clips.

    Args:
        draw: Turns indices into batches.
        process: How latents are noised.
        layout: See there.
        condition_noise: TimeNoise on the condition; None without.
        encoder: Encodes views at first use, where there is no cache of them.
        given_frames: Of the denoiser, see `FamilyDenoiser`.
    """

    can_use_gpu, is_captured = True, False  # sizes differ from step to step

    def __init__(
        self,
        draw: ClipDrawing | Callable[[Sequence[int]], Drawn],
        process: NoiseProcess,
        *,
        layout: Layout = "every frame",
        condition_noise: ConditionNoise | None = None,
        encoder: ClipEncoder | None = None,
        given_frames: int = 0,
    ) -> None:
        self.draw, self.layout = draw, layout
        self.process = deepcopy(process)  # it moves; that of `draw` stays where it can be pickled
        self._condition_noise, self._encoder = condition_noise, encoder
        self.given_frames = given_frames
        self._device = torch.device("cpu")

    def to(self, device: torch.device) -> None:
        """Move the encoder if there is one, and the noise schedule."""
        self._device = device
        if isinstance(self.process, VariancePreserving):
            self.process.to(device)
        if self._encoder is not None:
            self._encoder.to(device)

    @torch.no_grad()
    def prepare(self, drawn: Drawn) -> tuple[Any, ...]:
        """Noise latents and lay out the condition: pairs of both, one for each size."""
        return tuple(self._prepared(batch) for batch in self.batches(drawn))

    def batches(self, drawn: Drawn) -> tuple[ClipBatch, ...]:
        """Return what was drawn on the device; views that were read alone are encoded first."""
        if isinstance(drawn[0], ReadView):
            drawn = self._encoded(drawn)
        moved: tuple[ClipBatch, ...] = send_to_device(tuple(drawn), self._device)
        return moved

    def loss(self, module: nn.Module, *prepared: Any) -> torch.Tensor:
        """Compute the mean loss over all samples of all sizes."""
        return torch.cat(self.losses(module, *prepared)).mean()

    def losses(self, module: nn.Module, *prepared: Any) -> list[torch.Tensor]:
        """Compute each sample's loss, `[batch]`, for each size."""
        found = []
        for noised, condition in prepared:
            needs_gradients(noised.sample)
            predicted = module(noised.sample, noised.timesteps, condition)
            found.append(denoising_losses(predicted, noised, given_frames=self.given_frames))
        return found

    def _encoded(self, views: Sequence[ReadView]) -> tuple[ClipBatch, ...]:
        draw, encoder = self.draw, self._encoder
        assert isinstance(draw, ClipDrawing) and encoder is not None
        encoded = []
        for one in views:
            _, view = draw.views.draw(one.sample)
            shown = draw.views.frames_of(view)
            encoded.append((one.sample, encoder.encode(view, one.frames, condition_frames=shown)))
        return draw.batches(encoded)

    def _prepared(self, batch: ClipBatch) -> tuple[Noised, DenoiserCondition]:
        noised = self.process.noised(batch.latents, batch.noise, batch.times)
        shown = self._shown(batch)
        kept, token_noise = torch.ones_like(batch.frame_rate), batch.latents.new_zeros(1, 1, 1)
        if self._condition_noise is not None and batch.condition is not None:
            noise, draws = self._condition_noise.noise, batch.condition
            shares = self.process.time_shares(batch.times)
            shown = noise.on(shown, time_shares=shares, normal=draws.normal, noise=draws.noise)
            on_tokens = draws.on_tokens[:, None, None]
            if self._condition_noise.tokens == "replaced":
                kept = 1 - draws.on_tokens
                token_noise = on_tokens * draws.token_noise
            elif self._condition_noise.tokens == "noised":
                scales = noise.scales(shares, draws.token_normal)
                token_noise = on_tokens * scales[:, None, None] * draws.token_noise
        return noised, DenoiserCondition(
            latents=shown,
            prompt_embeds=batch.prompt_embeds,
            image_embeds=batch.image_embeds,
            frame_rate=batch.frame_rate,
            tokens_kept=kept,
            token_noise=token_noise,
            more=batch.more,
        )

    def _shown(self, batch: ClipBatch) -> torch.Tensor:
        """Lay the image's latents out, where the model's own pipeline has not done so."""
        if batch.shown is not None:
            return batch.shown
        if self.layout == "first and last":
            return first_and_last(batch.latents)
        return every_frame(batch.latents, batch.condition_frame)
