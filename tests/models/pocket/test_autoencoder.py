"""The pocket autoencoder: its transform, its trained decoder, its input checks."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from motionmerge.errors import ShapeError
from motionmerge.models.pocket.autoencoder import PocketAutoencoder, haar, inverse_haar
from motionmerge.models.pocket.components import build_pocket_model, load_decoder
from motionmerge.models.pocket.language import Actor, Program
from motionmerge.models.pocket.world import (
    HELD_OUT_PHOTOS,
    Canvases,
    Clips,
    Scene,
    render,
    sample_scene,
)


@pytest.fixture(scope="module")
def autoencoder() -> PocketAutoencoder:
    model = build_pocket_model()
    load_decoder(model)
    return model.autoencoder


@pytest.fixture(scope="module")
def clips() -> Clips:
    """Held-out pictures at the key frames."""
    rng = np.random.default_rng(0)
    canvases = Canvases(4, photos=HELD_OUT_PHOTOS, rng=rng, texture_share=0)
    scenes = [sample_scene(rng, num_canvases=4) for _ in range(4)]
    return render(scenes, canvases, np.linspace(0, 1, 8))


def psnr(a: torch.Tensor, b: torch.Tensor) -> float:
    return float(-10 * torch.log10((a - b).square().mean()))


def test_the_transform_is_orthonormal():
    x = torch.randn(2, 3, 16, 16)
    assert torch.allclose(inverse_haar(haar(x)), x, atol=1e-6)
    assert haar(x).square().sum() == pytest.approx(float(x.square().sum()), rel=1e-5)


def test_a_still_clip_has_zero_latents_and_decodes_to_the_photo(
    autoencoder: PocketAutoencoder, clips: Clips
):
    image = clips.video[:, 0]
    latents = autoencoder.encode(torch.zeros(4, 8, 2, 64, 64))
    assert latents.shape == (4, 8, 8, 8, 8)
    assert not latents.any()
    with torch.no_grad():
        video = autoencoder.decode(latents, image)
    assert video.shape == (4, 16, 3, 64, 64)
    assert psnr(video, image[:, None].expand_as(video)) > 35


def test_the_decoder_restores_held_out_clips(autoencoder: PocketAutoencoder, clips: Clips):
    image = clips.video[:, 0]
    with torch.no_grad():
        fields = autoencoder.fields(autoencoder.encode(clips.flow), image)
        video = autoencoder.paint(fields, image)
    still = image[:, None].expand_as(video)
    assert psnr(video, clips.video) > psnr(still, clips.video) + 6


def test_a_uniform_motion_is_one_latent_channel_an_axis(autoencoder: PocketAutoencoder):
    flow = torch.zeros(1, 8, 2, 64, 64)
    flow[:, :, 0] = 6.0
    latents = autoencoder.encode(flow)
    assert torch.allclose(latents[:, 0], torch.tensor(2 * 6.0 / autoencoder.config.flow_scale))
    assert not latents[:, 1:].any()


def test_a_clip_can_be_decoded_at_the_resolution_of_the_photo(autoencoder: PocketAutoencoder):
    photo = torch.rand(1, 3, 192, 192)
    with torch.no_grad():
        video = autoencoder.decode(torch.zeros(1, 8, 8, 8, 8), photo)
    assert video.shape == (1, 16, 3, 192, 192)
    assert psnr(video[:, 0], photo) > psnr(video[:, 0].mean() * torch.ones_like(photo), photo)


def test_images_and_latents_of_the_wrong_shape_are_refused(autoencoder: PocketAutoencoder):
    with pytest.raises(ShapeError, match=r"\[1, 3, 60, 60\].*multiple of 64"):
        autoencoder.encode_image(torch.zeros(1, 3, 60, 60))
    with pytest.raises(ShapeError, match="Latents have shape"):
        autoencoder.decode(torch.zeros(1, 4, 8, 8, 8), torch.zeros(1, 3, 64, 64))


def test_frames_between_key_frames_are_nearly_as_sharp_as_if_they_had_latents_of_their_own(
    autoencoder: PocketAutoencoder,
):
    rng = np.random.default_rng(1)
    canvases = Canvases(4, photos=HELD_OUT_PHOTOS, rng=rng, texture_share=0)
    program = Program((Actor("green", "ball", ("left",)),), "pans right")
    scenes = [Scene(program, 8.0, ((40.0, 30.0),), canvas) for canvas in range(4)]
    every = render(scenes, canvases, np.linspace(0, 1, 16))
    image = every.video[:, 0]
    with torch.no_grad():
        own = autoencoder.paint(autoencoder.fields(autoencoder.encode(every.flow), image), image)
        keys = render(scenes, canvases, autoencoder.keyframe_times().numpy())
        between = autoencoder.decode(autoencoder.encode(keys.flow), image)
    assert psnr(between, every.video) > psnr(own, every.video) - 0.3
