"""In each family, a denoiser computes what the pipeline's own network does in a denoising step."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from PIL import Image

from motionmerge.errors import ConfigError, ShapeError
from motionmerge.sampling.videos.make_video import pipeline_arguments, prepared
from motionmerge.sampling.videos.settings import VideoSettings
from motionmerge.training.denoisers.choice import denoiser_for
from motionmerge.training.denoisers.clean_latents import clip_moments, latent_scale
from motionmerge.training.denoisers.condition import plain_condition
from motionmerge.training.denoisers.encoding import encode_condition
from motionmerge.training.denoisers.family import FamilyDenoiser
from motionmerge.training.denoisers.wan import WanDenoiser
from motionmerge.training.objectives.noised import Noised, denoising_losses

from ...tiny import builders as build
from ...tiny.pipelines import EVERY_FAMILY, PROMPT, Family, photo, tiny

FPS = 8
TRAINED = [one for one in EVERY_FAMILY if one.name in {
    "SVD", "I2VGen-XL", "CogVideoX", "Wan 2.1", "Wan 2.2-A14B", "Wan 2.2-5B", "LTX", "Hunyuan",
    "Hunyuan 1.5", "SkyReels-V2",
}]  # fmt: skip
every_family = pytest.mark.parametrize("family", TRAINED, ids=lambda family: family.name)


def text_of(family: Family) -> dict[str, Any]:
    """Return the text features of a pipeline without text encoder, or how long its text is."""
    return {
        name: value
        for name, value in family.inputs(1).items()
        if name.startswith(("prompt_", "pooled_")) or name == "max_sequence_length"
    }


def clip_of(family: Family) -> np.ndarray:
    inputs = family.inputs(1)
    side = inputs.get("height", 16)
    image = np.asarray(photo(side))
    return np.stack([np.roll(image, 2 * shift, 1) for shift in range(inputs["num_frames"])])


@dataclass
class Taps:
    """What a pipeline's networks gave, and what its scheduler was handed, step by step."""

    predicted: list[torch.Tensor] = field(default_factory=list)
    stepped: list[tuple[torch.Tensor, torch.Tensor]] = field(default_factory=list)


@contextmanager
def tapped(pipeline: Any, family: Family) -> Iterator[Taps]:
    taps, step, is_scaled = Taps(), pipeline.scheduler.step, family.name == "SVD"

    def keep(module: Any, inputs: Any, output: Any) -> None:
        taps.predicted.append(output[0])

    def spy(model_output: torch.Tensor, timestep: Any, sample: torch.Tensor, **options: Any) -> Any:
        seen = pipeline.scheduler.scale_model_input(sample, timestep) if is_scaled else sample
        taps.stepped.append((timestep, seen))
        return step(model_output, timestep, sample, **options)

    hooks = [getattr(pipeline, one).register_forward_hook(keep) for one in family.denoisers]
    pipeline.scheduler.step = spy
    try:
        yield taps
    finally:
        del pipeline.scheduler.step
        for hook in hooks:
            hook.remove()


def sampled(pipeline: Any, family: Family, clip: np.ndarray) -> Taps:
    """Let the pipeline make a video without guidance."""
    text = text_of(family)
    has_text = pipeline.components.get("text_encoder") is not None
    has_size = "height" in family.inputs(1)
    settings = VideoSettings(
        prompt=PROMPT if has_text else None,
        num_frames=len(clip),
        height=clip.shape[1] if has_size else None,
        width=clip.shape[2] if has_size else None,
        frame_rate=FPS,
        guidance_scale=1.0,
        num_inference_steps=family.steps,
    )
    arguments = pipeline_arguments(pipeline, Image.fromarray(clip[0]), settings)
    arguments |= {**text, "output_type": "latent"}
    with prepared(pipeline, settings), tapped(pipeline, family) as taps:
        pipeline(**arguments)
    return taps


@every_family
def test_a_denoiser_predicts_what_the_pipelines_own_call_does(family: Family) -> None:
    pipeline, clip = tiny(family), clip_of(family)
    denoiser = denoiser_for(pipeline)
    assert isinstance(denoiser, FamilyDenoiser)
    taps = sampled(pipeline, family, clip)
    assert len(taps.predicted) == len(taps.stepped) == family.steps
    condition = encode_condition(
        pipeline, denoiser, clip, PROMPT, frame_rate=FPS, **text_of(family)
    )
    for expected, (time, sample) in zip(taps.predicted, taps.stepped, strict=True):
        noisy, asked = as_objective(family, sample), as_video(expected, sample)
        with torch.no_grad():
            predicted = denoiser(noisy, torch.as_tensor(time)[None], condition)
        given = denoiser.given_frames
        assert predicted.shape == noisy.shape
        assert torch.equal(predicted[:, :, given:], asked[:, :, given:])


def as_objective(family: Family, sample: torch.Tensor) -> torch.Tensor:
    """Turn what the scheduler was handed into what the noise process makes.

    Where the first frame is given, it is random: a denoiser must not see it.
    """
    if family.name in ("SVD", "CogVideoX"):
        return sample.transpose(1, 2)
    if family.name == "I2VGen-XL":
        return sample.transpose(0, 1)[None]
    first = torch.randn_like(sample[:, :, :1])
    if family.name == "LTX":
        return torch.cat([first, sample], 2)
    if family.name == "Wan 2.2-5B":
        return torch.cat([first, sample[:, :, 1:]], 2)
    return sample


def as_video(predicted: torch.Tensor, noisy: torch.Tensor) -> torch.Tensor:
    """Lay a network's output out as `[batch, channels, frames, height, width]`."""
    if predicted.ndim == 3:  # LTX
        return predicted.transpose(1, 2).unflatten(2, (-1, *noisy.shape[3:]))
    is_frames_first = predicted.shape[1:] == noisy.shape[1:] and predicted.shape[2] == 4
    return predicted.transpose(1, 2) if is_frames_first else predicted


@every_family
def test_clean_latents_begin_with_the_image_as_the_pipeline_encodes_it(
    family: Family, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Some pipelines draw the image's latents: of the clip and of the image, take the mean.
    monkeypatch.setattr(DiagonalGaussianDistribution, "sample", lambda self, _=None: self.mode())
    # Norms over time of CogVideoX and Hunyuan let later frames change the first: all are the same.
    pipeline, clip = tiny(family), np.repeat(clip_of(family)[:1], len(clip_of(family)), 0)
    denoiser = denoiser_for(pipeline)
    quiet = {"noise_aug_strength": 0.0} if family.name == "SVD" else {}
    condition = encode_condition(
        pipeline, denoiser, clip, PROMPT, frame_rate=FPS, **text_of(family), **quiet
    )
    mean, _ = clip_moments(pipeline.vae, clip).chunk(2, 1)
    latents = latent_scale(pipeline.vae)(mean)
    shown = condition.latents
    if family.name in ("Wan 2.1", "Wan 2.2-A14B", "SkyReels-V2"):
        shown = shown[:, 4:]  # behind the mask
    if family.name == "SVD":  # shown as the autoencoder gives it
        shown = latent_scale(pipeline.vae)(shown)
    first = shown[:, : latents.shape[1], :1]
    torch.testing.assert_close(latents[:, :, :1], first, atol=1e-5, rtol=1e-5)
    if not denoiser.given_frames:
        assert latents.shape[2:] == shown.shape[2:]


def test_a_batch_mixes_noise_of_both_networks_of_wan() -> None:
    family = next(one for one in TRAINED if one.name == "Wan 2.2-A14B")
    pipeline, clip = tiny(family), clip_of(family)
    denoiser = denoiser_for(pipeline)
    one = encode_condition(pipeline, denoiser, clip, PROMPT, frame_rate=FPS)
    condition = one._replace(
        latents=one.latents.repeat(3, 1, 1, 1, 1),
        prompt_embeds=one.prompt_embeds.repeat(3, 1, 1),
        image_embeds=one.image_embeds.repeat(3, 1, 1),
        tokens_kept=torch.ones(3),
    )
    noisy, times = torch.randn(3, 16, 3, 2, 2), torch.tensor([100.0, 950.0, 200.0])
    with torch.no_grad():
        together = denoiser(noisy, times, condition)
        for row, network in enumerate(("transformer_2", "transformer", "transformer_2")):
            alone = WanDenoiser(getattr(pipeline, network))(
                noisy[row : row + 1], times[row : row + 1], one
            )
            torch.testing.assert_close(together[row : row + 1], alone, atol=1e-5, rtol=1e-5)


def test_clips_of_other_frame_rates_share_a_batch_of_ltx() -> None:
    family = next(one for one in TRAINED if one.name == "LTX")
    pipeline, clip = tiny(family), clip_of(family)
    denoiser = denoiser_for(pipeline)
    slow, fast = (
        encode_condition(pipeline, denoiser, clip, PROMPT, frame_rate=rate, **text_of(family))
        for rate in (8, 24)
    )
    both = slow._replace(
        latents=torch.cat([slow.latents, fast.latents]),
        prompt_embeds=torch.cat([slow.prompt_embeds, fast.prompt_embeds]),
        frame_rate=torch.cat([slow.frame_rate, fast.frame_rate]),
        more={name: torch.cat([slow.more[name], fast.more[name]]) for name in slow.more},
    )
    noisy = torch.randn(1, 8, 3, 8, 8).repeat(2, 1, 1, 1, 1)
    with torch.no_grad():
        together = denoiser(noisy, torch.tensor([500.0, 500.0]), both)
        for row, condition in enumerate((slow, fast)):
            alone = denoiser(noisy[:1], torch.tensor([500.0]), condition)
            torch.testing.assert_close(together[row : row + 1], alone, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(together[0], together[1], atol=1e-4)


def test_hunyuan_that_replaces_the_first_frame_is_given_it() -> None:
    family = next(one for one in TRAINED if one.name == "Hunyuan")
    pipeline, clip = tiny(family), clip_of(family)
    size = dict(pipeline.transformer.config)
    size |= {"in_channels": 4, "image_condition_type": "token_replace", "guidance_embeds": True}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        pipeline.transformer = type(pipeline.transformer).from_config(size).eval()
    denoiser = denoiser_for(pipeline)
    assert denoiser.given_frames == 1
    taps = sampled(pipeline, family, clip)
    condition = encode_condition(
        pipeline, denoiser, clip, PROMPT, frame_rate=FPS, **text_of(family)
    )
    time, sample = taps.stepped[0]
    noisy = torch.cat([torch.randn_like(sample[:, :, :1]), sample], 2)
    with torch.no_grad():
        predicted = denoiser(noisy, time[None], condition)
    assert torch.equal(predicted[:, :, 1:], taps.predicted[0][:, :, 1:])


def test_the_first_frame_that_is_given_does_not_count() -> None:
    zeros = torch.zeros(1, 2, 3, 1, 1)
    noised = Noised(zeros, torch.ones(1), zeros, torch.ones(1))
    predicted = zeros.clone()
    predicted[:, :, 0] = 9
    predicted[:, :, 1] = 1
    assert denoising_losses(predicted, noised, given_frames=1).tolist() == [0.5]
    assert denoising_losses(predicted, noised).tolist() == pytest.approx([82 / 3])


def test_a_pipeline_without_a_denoiser_is_named() -> None:
    with pytest.raises(ConfigError, match="`LTX2ImageToVideoPipeline` is unknown"):
        denoiser_for(build.ltx_2())


def test_encoding_leaves_the_pipeline_as_it_was_and_prints_no_bar(
    capfd: pytest.CaptureFixture[str],
) -> None:
    family = next(one for one in TRAINED if one.name == "LTX")
    pipeline = tiny(family)
    pipeline.set_progress_bar_config(disable=False)
    before = dict(vars(pipeline))
    capfd.readouterr()
    encode_condition(
        pipeline, denoiser_for(pipeline), clip_of(family), PROMPT, frame_rate=FPS, **text_of(family)
    )
    assert "it/s" not in capfd.readouterr().err
    assert "progress_bar" not in vars(pipeline) and vars(pipeline).keys() >= before.keys()
    assert not pipeline.transformer._forward_pre_hooks


def test_a_length_that_the_family_does_not_make_is_refused() -> None:
    family = next(one for one in TRAINED if one.name == "Wan 2.1")
    pipeline = tiny(family)
    with pytest.raises(ConfigError, match="frames"):
        encode_condition(
            pipeline, denoiser_for(pipeline), clip_of(family)[:8], PROMPT, frame_rate=FPS
        )


def test_a_distilled_hunyuan_is_refused() -> None:
    pipeline = build.hunyuan_1_5()
    pipeline.transformer.register_to_config(use_meanflow=True)
    with pytest.raises(ConfigError, match="distilled"):
        denoiser_for(pipeline)


def test_frames_that_cogvideox_1_5_would_repeat_are_refused() -> None:
    pipeline = build.cogvideox()
    pipeline.transformer.register_to_config(patch_size_t=2)
    denoiser = denoiser_for(pipeline)
    condition = plain_condition(latents=torch.zeros(1, 4, 3, 2, 2))
    with pytest.raises(ShapeError, match="takes 2 at once"):
        denoiser(torch.zeros(1, 4, 3, 2, 2), torch.zeros(1), condition)
