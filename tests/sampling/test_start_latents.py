"""The latents that videos begin with: FrameInit, Analytic-Init, and noise that frames share."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, EulerDiscreteScheduler
from diffusers.pipelines.free_init_utils import FreeInitMixin
from PIL import Image
from safetensors import safe_open

from motionmerge.errors import ConfigError, ShapeError
from motionmerge.models.dynamicrafter.scheduler import DynamicRescaleDDIMScheduler
from motionmerge.sampling import AnalyticInit, FrameInit
from motionmerge.sampling.pipelines.dynamicrafter import DynamiCrafterPipeline
from motionmerge.sampling.pipelines.pocket import load_pocket
from motionmerge.sampling.pipelines.start_latents import correlated_noise, mix_frequencies

from ..models.reference_weights import DATA, vectors

VECTORS = vectors("consisti2v")
with safe_open(DATA / "consisti2v.safetensors", "pt") as file:
    FILTERS = json.loads(file.metadata()["filters"])

SCHEDULER = DDIMScheduler(
    beta_start=0.00085, beta_end=0.012, beta_schedule="linear", steps_offset=1, clip_sample=False
)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def mixed_noise(run: str) -> torch.Tensor:
    """The noise of an official run with c = 1, from what was drawn."""
    return 0.5**0.5 * (VECTORS[f"{run}.draw0"] + VECTORS[f"{run}.draw1"])


def frame_init_of(name: str) -> FrameInit:
    own = FILTERS[name]
    return FrameInit(
        method=own["method"],
        order=own.get("n", 4),
        spatial_stop_frequency=own["d_s"],
        temporal_stop_frequency=own["d_t"],
    )


@pytest.mark.parametrize("name", sorted(FILTERS))
def test_every_filter_is_the_official_one(name: str) -> None:
    made = frame_init_of(name).low_pass(FILTERS[name]["shape"][2:])
    torch.testing.assert_close(made, VECTORS[name], atol=1e-6, rtol=0)


@pytest.mark.parametrize("method", ["gaussian", "butterworth", "ideal"])
def test_filters_are_those_that_diffusers_computes_for_free_init(method: str) -> None:
    own = FrameInit(method=method, spatial_stop_frequency=0.4, temporal_stop_frequency=0.3)
    mixin = FreeInitMixin()
    theirs = mixin._get_free_init_freq_filter((1, 1, 5, 6, 9), "cpu", method, 4, 0.4, 0.3)
    torch.testing.assert_close(own.low_pass((5, 6, 9)), theirs[0, 0], atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    "run", ["text_guidance", "both_guidances", "text_rescale_eta1", "tiny_unet"]
)
def test_the_start_of_an_official_run_is_reproduced(run: str) -> None:
    noise = mixed_noise(run)
    still = VECTORS[f"{run}.first_frame"].expand_as(noise)
    made = FrameInit(timestep=850)(noise, still=still, scheduler=SCHEDULER, start_step=None)
    torch.testing.assert_close(made, VECTORS[f"{run}.start"], atol=1e-6, rtol=0)


def test_a_batch_gets_the_starts_of_its_videos() -> None:
    noise = VECTORS["vanilla_batch2.draw0"]
    still = VECTORS["vanilla_batch2.first_frame"].expand_as(noise)
    made = FrameInit()(noise, still=still, scheduler=SCHEDULER)
    torch.testing.assert_close(made, VECTORS["vanilla_batch2.start"], atol=1e-6, rtol=0)


def test_a_filter_that_lets_all_or_nothing_pass_gives_one_of_both_videos() -> None:
    low, high = torch.randn(2, 1, 4, 3, 6, 5, generator=seeded(0)).unbind(0)
    every = torch.ones(3, 6, 5)
    torch.testing.assert_close(mix_frequencies(low, high, every), low, atol=1e-5, rtol=0)
    torch.testing.assert_close(mix_frequencies(low, high, 0 * every), high, atol=1e-5, rtol=0)


def test_frames_share_the_noise_that_is_drawn_first_and_its_variance_is_one() -> None:
    shape = (2, 4, 16, 8, 8)
    made = correlated_noise(
        shape, generator=[seeded(1), seeded(2)], device=torch.device("cpu"), correlation=1.0
    )
    alone = correlated_noise(
        (1, *shape[1:]), generator=seeded(2), device=torch.device("cpu"), correlation=1.0
    )
    assert torch.equal(made[1:], alone)
    assert made.var().item() == pytest.approx(1, abs=0.05)
    assert made.mean(2).var().item() == pytest.approx(0.5 + 0.5 / 16, abs=0.08)


def test_frame_init_moves_the_start_of_a_dynamicrafter_to_its_photo(
    pipeline: DynamiCrafterPipeline, generate: Callable[..., torch.Tensor]
) -> None:
    starts: list[Any] = []
    pipeline.unet.register_forward_pre_hook(lambda _, args: starts.append(args[0]))
    own = {"guidance_scale": 1.0, "num_inference_steps": 1}
    plain = generate(pipeline, **own)
    mixed = generate(pipeline, start=FrameInit(timestep=300), **own)
    assert not torch.equal(plain, mixed)
    noise, still = starts[0][:, :4], starts[0][:, 4:]
    expected = FrameInit(timestep=300)(noise, still=still, scheduler=pipeline.scheduler)
    assert torch.equal(starts[1][:, :4], expected)


def test_a_rescaled_analytic_start_has_the_mean_of_what_the_model_was_trained_on() -> None:
    scheduler = DynamicRescaleDDIMScheduler()
    noise = torch.randn(1, 4, 3, 8, 8, generator=seeded(0))
    mean = torch.ones(1, 4, 3, 8, 8)
    made = {
        is_rescaled: AnalyticInit(mean, 0.0, is_rescaled)(
            0 * noise, scheduler=scheduler, start_step=940
        )
        for is_rescaled in (False, True)
    }
    torch.testing.assert_close(made[True], 0.7 * made[False])
    trained = scheduler.rescale_original(mean, torch.tensor([939]))
    expected = scheduler.add_noise(trained, 0 * noise, torch.tensor([939]))
    torch.testing.assert_close(made[True], expected)


def test_what_a_start_cannot_do_is_refused_by_name() -> None:
    noise = torch.zeros(1, 4, 3, 8, 8)
    with pytest.raises(ConfigError, match="which this model does not have"):
        FrameInit()(noise, still=None, scheduler=SCHEDULER)
    with pytest.raises(ShapeError, match=r"\[1, 4, 2, 8, 8\]"):
        FrameInit()(noise, still=noise[:, :, :2], scheduler=SCHEDULER)
    with pytest.raises(ConfigError, match="EulerDiscreteScheduler has no FrameInit"):
        FrameInit()(noise, still=noise, scheduler=EulerDiscreteScheduler())
    with pytest.raises(ConfigError, match=r"timestep 1000(.|\n)*0 to 999"):
        FrameInit(timestep=1000)(noise, still=noise, scheduler=SCHEDULER)
    for wrong in ({"method": "sharp"}, {"order": 0}, {"spatial_stop_frequency": 0.0}):
        with pytest.raises(ConfigError, match="FrameInit's"):
            FrameInit(**wrong)  # type: ignore[arg-type]


def test_what_makes_no_latents_is_refused_before_anything_is_encoded(
    pipeline: DynamiCrafterPipeline, generate: Callable[..., torch.Tensor]
) -> None:
    with pytest.raises(ConfigError, match=r"`start` is 'frameinit'(.|\n)*Pass FrameInit"):
        generate(pipeline, start="frameinit")


def test_a_model_whose_image_latents_are_no_video_takes_analytic_init_alone(
    photo: Image.Image,
) -> None:
    pocket = load_pocket()
    own = {"num_inference_steps": 1, "height": 64, "width": 64, "output_type": "latent"}
    with pytest.raises(ConfigError, match="use AnalyticInit"):
        pocket(photo, "the camera pans left", start=FrameInit(), **own)
    statistics = AnalyticInit(torch.zeros(1), 0.5)
    assert pocket(photo, "the camera pans left", start=statistics, **own).frames.isfinite().all()
