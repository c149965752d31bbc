"""VideoCrafter's pipeline: its defaults, what it refuses, and the family that it is called by."""

from __future__ import annotations

import pytest
import torch
from PIL import Image

from motionmerge.errors import ConfigError
from motionmerge.sampling.videos.make_video import encode_ahead, family_and_limits, make_video
from motionmerge.sampling.videos.settings import VideoSettings

from ..tiny.dynamicrafter import tiny_videocrafter

SIZE = {"num_frames": 5, "num_inference_steps": 2}


def seeded(seed: int = 7) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_its_defaults_are_the_official_scripts_and_its_unet_sees_four_channels(
    photo: Image.Image,
) -> None:
    pipeline, seen = tiny_videocrafter(), []
    pipeline.unet.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append((args[0].shape[1], kwargs["frame_rate"])),
        with_kwargs=True,
    )
    common = {"generator": seeded(), "output_type": "pt", **SIZE}
    video = pipeline(photo, "a cat", **common).frames
    assert video.shape == (1, 5, 3, 16, 16)
    assert set(seen) == {(4, 8)}
    told = {"guidance_scale": 12.0, "guidance_rescale": 0.0, "eta": 1.0}
    again = pipeline(photo, "a cat", **{**common, "generator": seeded()}, **told).frames
    assert torch.equal(video, again)


def test_a_video_of_settings_is_the_pipelines_own_also_when_encoded_ahead(
    photo: Image.Image,
) -> None:
    pipeline = tiny_videocrafter()
    asked = VideoSettings(prompt="a cat", start_step=900, height=16, width=16, **SIZE)
    own = {"height": 16, "width": 16, "start_step": 900, "output_type": "pt", **SIZE}
    expected = pipeline(photo, "a cat", generator=seeded(0), **own).frames[0]
    assert torch.equal(make_video(pipeline, photo, asked), expected)
    (conditions,) = encode_ahead(pipeline, photo, [asked])
    assert torch.equal(make_video(pipeline, photo, asked, conditions=conditions), expected)


def test_a_last_image_is_refused(photo: Image.Image) -> None:
    pipeline = tiny_videocrafter()
    family, limits = family_and_limits(pipeline)
    assert family.name == "videocrafter"
    assert not limits.takes_last_image
    with pytest.raises(ConfigError, match=r"cannot end with an image(.|\n)*Leave last_image out"):
        pipeline(photo, "a cat", last_image=photo, **SIZE)
