"""What a denoiser is trained on, drawn from clips: each sample from (seed, its index) alone.

A sample is drawn where the random numbers of all processes are the same, on the CPU, and whether
what the encoders make of its view was kept before, or is made at first use, changes no bit of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Annotated, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from pydantic import Field

from motionmerge.errors import DataError
from motionmerge.rng import generator_for, whole_number_for

from .clip_encoder import Blanks, EncodedView
from .config_file import ConfigSection
from .denoisers.clean_latents import LatentScale
from .latents_cache import LatentsCache, drawn_latents
from .objectives.noised import NoiseProcess
from .objectives.time_noise import TimeNoise
from .samples import ClipOrder, NoiseRange, SampleDraw, draw_sample, shares_within
from .views import ClipView, TrainingShot, ViewSettings, view_of

ConditionFrames = Annotated[int, Field(ge=1)] | Literal["first"]
"""How many of a view's frames may be the image, drawn for each view; or the first alone."""


class ConditionNoise(ConfigSection):
    """TimeNoise on the image, as Zhao et al. 2024 (CIL) train.

    Attributes:
        strength, power: See `TimeNoise`.
        tokens: What happens to the image tower's tokens: they are `kept`, `noised` as the latents
            are, or `replaced` by noise altogether.
        token_share: In what share of the samples.
    """

    strength: float = Field(100.0, ge=0, le=1e6)
    power: float = Field(5.0, gt=0, le=1e6)
    tokens: Literal["kept", "noised", "replaced"] = "replaced"
    token_share: float = Field(0.95, ge=0, le=1)

    @property
    def noise(self) -> TimeNoise:
        """The noise itself."""
        return TimeNoise(strength=self.strength, power=self.power)


class ConditionDraws(NamedTuple):
    """The draws of `ConditionNoise`.

    Args:
        normal, token_normal: n in `TimeNoise`, `[batch]`.
        noise: On the latents, `[batch, channels, frames, height, width]`.
        token_noise: `[batch, tokens, dim]`.
        on_tokens: 1 where it falls on the tokens, else 0, `[batch]`.
    """

    normal: torch.Tensor
    noise: torch.Tensor
    token_normal: torch.Tensor
    token_noise: torch.Tensor
    on_tokens: torch.Tensor


class ClipBatch(NamedTuple):
    """Samples of one size.

    Args:
        latents: Clean and scaled, `[batch, channels, frames, height, width]`.
        noise: As `latents`.
        times: Of the noise process, `[batch]`.
        condition_frame: Number of the frame that is the image, `[batch]`.
        prompt_embeds, image_embeds: Tokens, or what stands for dropped ones,
            `[batch, tokens, dim]`.
        frame_rate: As the model is told, `[batch]`.
        condition: Of TimeNoise; None without.
        shown: Latents of the image, as the denoiser takes them; None where they are taken from
            `latents`.
        more: See `DenoiserCondition`.
    """

    latents: torch.Tensor
    noise: torch.Tensor
    times: torch.Tensor
    condition_frame: torch.Tensor
    prompt_embeds: torch.Tensor
    image_embeds: torch.Tensor
    frame_rate: torch.Tensor
    condition: ConditionDraws | None
    shown: torch.Tensor | None = None
    more: Mapping[str, torch.Tensor] = MappingProxyType({})


class ReadView(NamedTuple):
    """A sample whose view was decoded and is yet to be encoded.

    Args:
        sample: Its index.
        frames: `[frames, height, width, 3]`, 8 bits.
    """

    sample: int
    frames: npt.NDArray[np.uint8]


@dataclass(frozen=True, kw_only=True, eq=False)
class TrainingViews:
    """The views that there are, and which a sample shows.

    Args:
        shots: What views are taken of.
        settings: How.
        num_views: Of each shot.
        condition_frames: See `ConditionFrames`.
        order: Of the shots.
        seed: Of the run.
        drop, drop_caption: See `samples`.
    """

    shots: Sequence[TrainingShot]
    settings: ViewSettings
    num_views: int
    condition_frames: ConditionFrames
    order: ClipOrder
    seed: int
    drop: float
    drop_caption: float = 0.0

    def every(self) -> list[ClipView]:
        """List all views."""
        return [
            view_of(shot, number, self.settings)
            for shot in self.shots
            for number in range(self.num_views)
        ]

    def frames_of(self, view: ClipView) -> tuple[int, ...]:
        """Return the numbers of the frames of a view that may be the image."""
        if not isinstance(self.condition_frames, int):
            return (0,)
        drawn = whole_number_for(
            self.settings.seed, "condition frames", *view.shot.key, str(view.number)
        )
        most = min(self.condition_frames, len(view.indices))
        chosen = np.random.default_rng(drawn).permutation(len(view.indices))[:most]
        return tuple(sorted(int(one) for one in chosen))

    def draw(self, index: int) -> tuple[SampleDraw, ClipView]:
        """Draw a sample and the view that it shows."""
        num = 1
        if isinstance(self.condition_frames, int):
            num = min(self.condition_frames, self.settings.num_frames)
        draw = draw_sample(
            self.seed,
            index,
            order=self.order,
            num_views=self.num_views,
            num_condition_frames=num,
            drop=self.drop,
            drop_caption=self.drop_caption,
        )
        return draw, view_of(self.shots[draw.clip], draw.view, self.settings)


@dataclass(frozen=True, kw_only=True, eq=False)
class ClipDrawing:
    """Turns indices into batches; it pickles, so that other processes can draw ahead.

    Args:
        views: See there.
        process: Which times there are.
        noise_range: Which of them are trained on.
        latent_scale: How latents are scaled.
        blanks: What stands for what is dropped.
        rate_of: What the model is told of a view's rate; of `ClipEncoder`.
        condition_noise: TimeNoise; None without.
        token_shape: Of the image tokens that noise is added to, `(tokens, dim)`.
        cache: Where views were kept; None if they are encoded at first use.
    """

    views: TrainingViews
    process: NoiseProcess
    noise_range: NoiseRange
    latent_scale: LatentScale
    blanks: Blanks
    rate_of: Callable[[ClipView], float]
    condition_noise: ConditionNoise | None
    token_shape: tuple[int, int]
    cache: LatentsCache | None

    def __call__(self, indices: Sequence[int]) -> tuple[ClipBatch, ...] | tuple[ReadView, ...]:
        """Draw samples: in batches of one size each, or their frames alone without a cache."""
        if self.cache is None:
            return tuple(self._read(index) for index in indices)
        return self.batches((index, self._kept(index)) for index in indices)

    def _read(self, index: int) -> ReadView:
        _, view = self.views.draw(index)
        return ReadView(index, view.read())

    def _kept(self, index: int) -> EncodedView:
        assert self.cache is not None
        _, view = self.views.draw(index)
        kept = self.cache.read(view)
        if kept is None:
            raise DataError(
                f"{view.shot.clip.name} is not in {self.cache.folder} any more.",
                fix="Start the same command again: it encodes what is missing, and goes on.",
            )
        return EncodedView.of_tensors(kept)

    def batches(self, encoded: Iterable[tuple[int, EncodedView]]) -> tuple[ClipBatch, ...]:
        """Join samples, given by their indices, into a batch for each size, also of the text.

        A batch of one size may hold fewer samples; the loss weighs samples, not batches.
        """
        groups: dict[tuple[torch.Size, ...], list[ClipBatch]] = {}
        for index, view in encoded:
            one = self._sample(index, view)
            groups.setdefault(_shapes_of(one), []).append(one)
        return tuple(_joined(group) for group in groups.values())

    def _sample(self, index: int, encoded: EncodedView) -> ClipBatch:
        """Draw all that is random in a sample; a batch of one."""
        seed, name = self.views.seed, str(index)
        draw, view = self.views.draw(index)
        drawn = drawn_latents(encoded.moments, seed=seed, sample=index)
        latents = self.latent_scale(drawn.transpose(0, 1)[None]).float()
        shares = shares_within(torch.tensor([draw.time_share]), self.process, self.noise_range)
        encoded = self._without_what_is_dropped(encoded, draw)
        return ClipBatch(
            latents=latents,
            noise=_normal(latents.shape, seed, "noise", name),
            times=self.process.times_at(shares),
            condition_frame=torch.tensor([self.views.frames_of(view)[draw.condition_frame]]),
            prompt_embeds=_one(encoded.prompt_embeds),
            image_embeds=_one(encoded.image_embeds[0]),
            frame_rate=torch.tensor([self.rate_of(view)]),
            condition=self._condition_draws(latents.shape, seed, name),
            shown=None if encoded.shown is None else _one(encoded.shown),
            more={name: _one(value) for name, value in encoded.more.items()},
        )

    def _without_what_is_dropped(self, encoded: EncodedView, draw: SampleDraw) -> EncodedView:
        """Keep one image of a view, and put blanks where caption or image are dropped."""
        blanks, image = self.blanks, encoded.image_embeds[draw.condition_frame]
        if draw.without_caption:
            more = encoded.more if blanks.more is None else blanks.more
            encoded = encoded._replace(prompt_embeds=blanks.prompt_embeds, more=more)
        if draw.without_image:
            image = blanks.image_embeds
            if encoded.shown is not None and blanks.shown is not None:
                encoded = encoded._replace(shown=blanks.shown.expand_as(encoded.shown))
        return encoded._replace(image_embeds=image[None])

    def _condition_draws(self, shape: torch.Size, seed: int, name: str) -> ConditionDraws | None:
        if self.condition_noise is None:
            return None
        numbers = _normal((2,), seed, "TimeNoise", name)
        coin = torch.rand(1, generator=generator_for(seed, "noise on tokens", name))
        return ConditionDraws(
            normal=numbers[:1],
            noise=_normal(shape, seed, "noise on latents", name),
            token_normal=numbers[1:],
            token_noise=_normal((1, *self.token_shape), seed, "token noise", name),
            on_tokens=(coin < self.condition_noise.token_share).float(),
        )


def _normal(shape: Sequence[int], seed: int, *names: str) -> torch.Tensor:
    return torch.randn(tuple(shape), generator=generator_for(seed, *names))


def _one(values: torch.Tensor) -> torch.Tensor:
    """Return values as a batch of one; numbers with a fraction in fp32, masks as they are."""
    return (values.float() if values.is_floating_point() else values)[None]


def _shapes_of(sample: ClipBatch) -> tuple[torch.Size, ...]:
    """Return what has to be the same in a batch."""
    return (sample.latents.shape, sample.prompt_embeds.shape, sample.image_embeds.shape)


def _joined(samples: Sequence[ClipBatch]) -> ClipBatch:
    def column(name: str) -> torch.Tensor:
        return torch.cat([getattr(one, name) for one in samples])

    draws = [one.condition for one in samples if one.condition is not None]
    shown = [one.shown for one in samples if one.shown is not None]
    return ClipBatch(
        latents=column("latents"),
        noise=column("noise"),
        times=column("times"),
        condition_frame=column("condition_frame"),
        prompt_embeds=column("prompt_embeds"),
        image_embeds=column("image_embeds"),
        frame_rate=column("frame_rate"),
        condition=ConditionDraws(*map(torch.cat, zip(*draws, strict=True))) if draws else None,
        shown=torch.cat(shown) if shown else None,
        more={name: torch.cat([one.more[name] for one in samples]) for name in samples[0].more},
    )
