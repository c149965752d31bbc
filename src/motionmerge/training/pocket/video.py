"""Train the pocket video model: base, the adapter of stage 1, and its controls.

Base: broad camera amplitudes, captions that are often missing or wrong, text in spatial attention
only; so motion is rich and the prompt weakly coupled. Stage 1: the temporal adapter is added and
the whole is fine-tuned, on right captions and data that is mostly slow with a tail of fast clips;
so the prompt is obeyed and motion degree falls, which is what stages 2 and 3 undo. Schedule and
objective are DynamiCrafter's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from motionmerge.models.dynamicrafter.scheduler import DynamicRescaleDDIMScheduler
from motionmerge.models.pocket.autoencoder import LATENT_CHANNELS
from motionmerge.models.pocket.components import PocketModel, attention_kernel
from motionmerge.models.pocket.language import Program, corrupt_program
from motionmerge.models.pocket.text import PocketTokenizer
from motionmerge.models.pocket.towers import normalize_image
from motionmerge.models.pocket.world import (
    FRAME_RATE,
    TRAINING_PHOTOS,
    Canvases,
    Staging,
    render_staged,
    sample_scene,
    stage,
)
from motionmerge.parameter_groups import group_of
from motionmerge.training.objective import needs_gradients
from motionmerge.training.settings import TrainerSettings, TrainingProgress, TrainingResult
from motionmerge.training.trainer import fit


@dataclass(frozen=True)
class ClipData:
    """Which clips and captions to train on.

    Args:
        slow_power: Camera amplitudes are MAX_AMPLITUDE * u ** slow_power. missing_captions,
        wrong_captions: Shares of empty captions and of captions that tell of other
            moves of the same objects (what they say of the camera stays true).
        missing_images: Share of blanked image tokens (guidance needs it).
    """

    slow_power: float
    missing_captions: float
    wrong_captions: float
    missing_images: float = 0.05


Trains = Literal["adapter and U-Net", "U-Net", "adapter and temporal blocks", "temporal blocks"]

OBJECT_WEIGHT = 12.0
"""How much more than the rest the places of objects count, where they do: they are small."""


class Denoiser(nn.Module):
    """Image projector and U-Net in one forward pass, as data parallelism needs it."""

    def __init__(self, model: PocketModel) -> None:
        super().__init__()
        self.unet = model.unet
        self.image_projector = model.image_projector

    def forward(
        self,
        latents: torch.Tensor,
        timesteps: torch.Tensor,
        text: torch.Tensor,
        image_embeds: torch.Tensor,
    ) -> torch.Tensor:
        tokens = torch.cat([text, self.image_projector(image_embeds)], 1)
        rate = torch.full_like(timesteps, FRAME_RATE)
        return self.unet(latents, timesteps, tokens, rate, return_dict=False)[0]


class TrainingBatch(NamedTuple):
    """A batch of what the denoiser is trained on.

    Args:
        clean: Latents of the motion, `[batch, 8, keyframes, 8, 8]`.
        image_latents: `[batch, 12, 8, 8]`.
        text: Text tokens, `[batch, tokens, dim]`.
        image_embeds: Tokens of the image tower, `[batch, tokens, dim]`.
        noise: As `clean`.
        timesteps: `[batch]`.
        is_object: 1 in cells that show an object, else 0: `[batch, 1, keyframes, 8, 8]`.
    """

    clean: torch.Tensor
    image_latents: torch.Tensor
    text: torch.Tensor
    image_embeds: torch.Tensor
    noise: torch.Tensor
    timesteps: torch.Tensor
    is_object: torch.Tensor


class DrawnClips(NamedTuple):
    """What the samples are made of, on the CPU: n = batch.

    Args:
        staging: What happens where.
        token_ids: Captions, `[n, tokens]`.
        is_blank: Whether the image tower sees nothing, `[n]`.
        noise, timesteps: As in `TrainingBatch`.
    """

    staging: Staging
    token_ids: torch.Tensor
    is_blank: torch.Tensor
    noise: torch.Tensor
    timesteps: torch.Tensor


@dataclass(frozen=True, kw_only=True)
class ClipDraw:
    """Draw clips by their indices; every one from (seed, index) alone.

    Args:
        data: Which clips and captions.
        seed: See above.
        num_canvases: Size of the picture pool.
        times: Of the key frames, in [0, 1].
        num_timesteps: Of the diffusion process.
    """

    data: ClipData
    seed: int
    num_canvases: int
    times: np.ndarray
    num_timesteps: int

    def __call__(self, indices: Sequence[int]) -> DrawnClips:
        scenes, captions, blanks, noises, timesteps = [], [], [], [], []
        for index in indices:
            rng = np.random.default_rng((self.seed, 7, index))
            scene = sample_scene(
                rng, num_canvases=self.num_canvases, slow_power=self.data.slow_power
            )
            scenes.append(scene)
            captions.append(self._caption(rng, scene.program))
            blanks.append(rng.random() < self.data.missing_images)
            timesteps.append(int(rng.integers(self.num_timesteps)))
            shape = (LATENT_CHANNELS, len(self.times), 8, 8)
            noises.append(rng.standard_normal(shape, dtype=np.float32))
        return DrawnClips(
            stage(scenes, self.times),
            PocketTokenizer()(captions),
            torch.tensor(blanks),
            torch.from_numpy(np.stack(noises)),
            torch.tensor(timesteps),
        )

    def _caption(self, rng: np.random.Generator, program: Program) -> str:
        draw = rng.random()
        if draw < self.data.missing_captions:
            return ""
        if draw < self.data.missing_captions + self.data.wrong_captions:
            program = corrupt_program(rng, program)
        return program.caption()


class VideoObjective:
    """Weighted squared error of the velocity at a random timestep, as DynamiCrafter is trained.

    loss = mean(w |v - unet(x_t, t, caption, image)|^2) / mean(w)
    x_t  = sqrt(abar) x0 + sqrt(1 - abar) noise,   v = sqrt(abar) noise - sqrt(1 - abar) x0

    It is an `Objective`: clips are drawn on the CPU, rendered and encoded on the device.

    Args:
        model: Supplies towers, autoencoder and tokenizer; only read.
        data: Which clips.
        seed: Every sample is drawn from (seed, its index).
        object_weight: w in the latent cells that show an object; 1 elsewhere.
        num_canvases: Pictures in the pool.
    """

    can_use_gpu, is_captured = True, True

    def __init__(
        self,
        model: PocketModel,
        data: ClipData,
        *,
        seed: int,
        object_weight: float = OBJECT_WEIGHT,
        num_canvases: int = 1500,
    ) -> None:
        self.model, self.object_weight = model, object_weight
        self.scheduler = DynamicRescaleDDIMScheduler(**model.scheduler.config)
        rng = np.random.default_rng((seed, 6))
        self.canvases = Canvases(num_canvases, photos=TRAINING_PHOTOS, rng=rng)
        self.draw = ClipDraw(
            data=data,
            seed=seed,
            num_canvases=num_canvases,
            times=model.autoencoder.keyframe_times().numpy(),
            num_timesteps=self.scheduler.config.num_train_timesteps,
        )

    def to(self, device: torch.device) -> None:
        """Move towers, autoencoder and pictures."""
        for part in (self.model.text_encoder, self.model.image_encoder, self.model.autoencoder):
            part.to(device)
        self.canvases.to(device)
        self.scheduler.alphas_cumprod = self.scheduler.alphas_cumprod.to(device)

    @torch.no_grad()
    def prepare(self, drawn: DrawnClips) -> TrainingBatch:
        """Render and encode."""
        model = self.model
        clips = render_staged(drawn.staging, self.canvases)
        image = clips.video[:, 0]
        shown = torch.where(drawn.is_blank[:, None, None, None], 0.5, image)
        is_object = F.adaptive_max_pool2d(clips.is_object.flatten(0, 1).float(), 8)
        return TrainingBatch(
            clean=model.autoencoder.encode(clips.flow),
            image_latents=model.autoencoder.encode_image(image),
            text=model.text_encoder(drawn.token_ids).last_hidden_state,
            image_embeds=model.image_encoder(normalize_image(shown)).last_hidden_state,
            noise=drawn.noise,
            timesteps=drawn.timesteps,
            is_object=is_object.unflatten(0, clips.is_object.shape[:2]).transpose(1, 2),
        )

    def loss(self, denoiser: nn.Module, *prepared: torch.Tensor) -> torch.Tensor:
        """Return the loss above, of the fields of `TrainingBatch`."""
        sample = TrainingBatch(*prepared)
        noisy = self.scheduler.add_noise(sample.clean, sample.noise, sample.timesteps)
        needs_gradients(noisy)
        condition = sample.image_latents[:, :, None].expand(-1, -1, noisy.shape[2], -1, -1)
        predicted = denoiser(
            torch.cat([noisy, condition], 1), sample.timesteps, sample.text, sample.image_embeds
        )
        velocity = self.scheduler.get_velocity(sample.clean, sample.noise, sample.timesteps)
        weight = 1 + (self.object_weight - 1) * sample.is_object
        error = (predicted.float() - velocity).square().mean(1, keepdim=True)
        return (weight * error).mean() / weight.mean()

    def batch(self, indices: Sequence[int]) -> TrainingBatch:
        """Draw, render, caption and encode the samples with these indices."""
        return self.prepare(self.draw(indices))


def train_base(
    model: PocketModel,
    folder: Path,
    *,
    data: ClipData,
    settings: TrainerSettings,
    on_progress: Callable[[TrainingProgress], None] | None = None,
) -> TrainingResult:
    """Train U-Net and image projector from scratch; `model` is left with the averaged weights."""
    objective = VideoObjective(model, data, seed=settings.seed)
    return fit(
        Denoiser(model),
        objective,
        settings,
        folder,
        identity={"data": asdict(data)},
        kernels=attention_kernel,
        on_progress=on_progress,
    )


def fine_tune(
    model: PocketModel,
    folder: Path,
    *,
    data: ClipData,
    settings: TrainerSettings,
    trains: Trains,
    on_progress: Callable[[TrainingProgress], None] | None = None,
) -> TrainingResult:
    """Fine-tune a base that carries a fresh adapter.

    Args:
        model: Changed in place. It must have a temporal adapter (the identity before training).
        folder: Where the run lives.
        data: Which clips and captions.
        settings: How to optimize.
        trains: Which parameters of the U-Net, see `trained_parameters`.
        on_progress: Called after each logged step.
    """
    denoiser = Denoiser(model)
    own = dict(model.unet.named_parameters())
    trainable = [own[name] for name in trained_parameters(model, trains)]
    return fit(
        denoiser,
        VideoObjective(model, data, seed=settings.seed),
        settings,
        folder,
        trainable=trainable,
        identity={"data": asdict(data)},
        kernels=attention_kernel,
        on_progress=on_progress,
    )


def trained_parameters(model: PocketModel, trains: Trains) -> list[str]:
    """Return the names of the U-Net parameters that a fine-tune changes.

    Args:
        model: With a temporal adapter.
        trains: "adapter and U-Net" is stage 1 (the paper fine-tunes the integrated model); "U-Net"
            the naive fine-tune, its adapter left as the identity; "adapter and temporal blocks" and
            "temporal blocks" the same pair on the temporal half alone.
    """
    names = [name for name, _ in model.unet.named_parameters()]
    if "temporal blocks" in trains:
        names = [name for name in names if "tempo" in name]
    if "adapter" not in trains:
        names = [name for name in names if group_of(name) != "adapter"]
    return names
