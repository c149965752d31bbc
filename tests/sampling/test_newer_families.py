"""The families of 2026 are called within their limits, which are what their pipelines make."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from PIL import Image

from motionmerge.errors import ConfigError
from motionmerge.io.video import fit_image
from motionmerge.sampling.families.families import REFUSED, configs_of, family_of
from motionmerge.sampling.families.limits import Limits
from motionmerge.sampling.videos.checks import check_settings
from motionmerge.sampling.videos.make_video import make_video
from motionmerge.sampling.videos.settings import VideoSettings

from ..tiny.pipelines import NEWER, PROMPT, Family, load_weights, other_weights, photo, tiny

BY_NAME = {family.name: family for family in NEWER}
IN_SETTINGS = {"image", "prompt", "negative_prompt", "height", "width", "num_frames"}
REWRITTEN = {
    "video",
    "frames",
    "use_resolution_binning",
    "enable_temporal_reasoning",
    "num_temporal_reasoning_steps",
    "sample_audio",
    "num_inference_steps",
    "guidance_scale",
    "true_cfg_scale",
}

newer = pytest.mark.parametrize("family", NEWER, ids=lambda family: family.name)


def limits_of(pipeline: Any) -> Limits:
    return family_of(type(pipeline).__name__).limits(configs_of(pipeline))


def asked_of(family: Family, pipeline: Any, **more: Any) -> tuple[VideoSettings, dict[str, Any]]:
    """Give the settings of a short video, and arguments that settings have no words for."""
    inputs, limits = family.inputs(1), limits_of(pipeline)
    sides = ("height", "width") if limits.height is not None else ()
    settings = VideoSettings(
        prompt=PROMPT if inputs.get("prompt") else None,
        num_inference_steps=3 if family.name == "MiniMax-H3" else 2,
        num_frames=limits.nearest_num_frames(5),
        **{side: inputs[side] for side in sides},
    )
    left = IN_SETTINGS | REWRITTEN
    options = {name: value for name, value in inputs.items() if name not in left}
    if family.name == "Motif":
        options["prompt"] = None  # it wants to be told so
    if family.name == "Cosmos 2":
        options["output_type"] = "latent"  # it rounds its frames
    return settings.changed(**more), options


@newer
def test_videos_have_the_frames_asked_for(family: Family) -> None:
    pipeline = tiny(family)
    limits = limits_of(pipeline)
    settings, options = asked_of(family, pipeline)
    options.pop("output_type", None)
    lengths = [n for n in range(1, 150) if limits.nearest_num_frames(n) == n]
    for num_frames in lengths[: 1 if family.name == "MiniMax-H3" else 3]:
        video = make_video(pipeline, photo(24), settings.changed(num_frames=num_frames), **options)
        side = settings.height or 16
        assert video.shape == (num_frames, 3, side, side)
        assert video.isfinite().all() and 0 <= video.min() < video.max() <= 1


@newer
def test_a_family_says_when_negative_prompts_are_read(family: Family) -> None:
    if family.name == "MiniMax-H3":
        pytest.skip("its pipeline has no negative prompt")
    pipeline = tiny(family)
    load_weights(pipeline, family, other_weights(pipeline, family, seed=1))
    called = family_of(type(pipeline).__name__)
    for scale in (None, 0.5, 1.0, 3.0):
        settings, options = asked_of(family, pipeline, guidance_scale=scale)
        videos = []
        for sign, text in ((1, "the camera"), (-1, "a cat jumps")):
            negative = {
                name: sign * value
                for name, value in options.items()
                if name.startswith("negative") and value.is_floating_point()
            }
            if settings.prompt is not None and called.is_guided(scale):
                settings = settings.changed(negative_prompt=text)
            elif settings.prompt is not None:
                negative["negative_prompt"] = [text]
            videos.append(make_video(pipeline, photo(24), settings, **{**options, **negative}))
        assert torch.equal(*videos) is not called.is_guided(scale), scale


@newer
def test_a_photo_of_another_shape_is_cut_and_decides_the_video(family: Family) -> None:
    pipeline = tiny(family)
    load_weights(pipeline, family, other_weights(pipeline, family, seed=1))
    settings, options = asked_of(family, pipeline)
    wide = photo(40).crop((0, 8, 40, 32))
    photos = [wide, wide.transpose(Image.Transpose.ROTATE_90)]
    lying, standing = (make_video(pipeline, one, settings, **options) for one in photos)
    assert lying.shape == standing.shape and not torch.equal(lying, standing)


NAMED = [
    ("SkyReelsV2DiffusionForcingImageToVideoPipeline", {"num_frames": 101}, "Use 97 frames"),
    ("AnyFlowFARPipeline", {"num_frames": 77}, "Use 81 frames"),
    ("AnyFlowFARPipeline", {"height": 490}, "height 480 and width 832"),
    ("ChronoEditPipeline", {"num_frames": 1}, "Use 5 frames"),
    ("Cosmos2VideoToWorldPipeline", {"num_frames": 92}, "Use 93 frames"),
    ("HeliosPipeline", {"num_frames": 132}, "Use 129 frames"),
    ("HeliosModularPipeline", {"num_frames": 161}, "Use 165 frames"),
    ("HunyuanVideoFramepackPipeline", {"num_frames": 129}, "Use 145 frames"),
    ("HunyuanVideoFramepackPipeline", {"num_frames": 1}, "Use 37 frames"),
    ("HunyuanVideoFramepackPipeline", {"negative_prompt": "a dog"}, "negative_prompt"),
    ("MotifVideoImage2VideoPipeline", {"num_frames": 1}, "Use 5 frames"),
    ("SanaImageToVideoPipeline", {"height": 490}, "height 480 and width 832"),
    ("Kandinsky6TI2VAPipeline", {"num_frames": 120}, "Use 121 frames"),
    ("MiniMaxH3ModularPipeline", {"num_frames": 121}, "Use 124 frames"),
    ("MiniMaxH3ModularPipeline", {"num_frames": 400}, "Use 345 frames"),
    ("MiniMaxH3ModularPipeline", {"guidance_scale": 5.0}, "guidance_scale"),
    ("MiniMaxH3ModularPipeline", {"negative_prompt": "a dog"}, "negative_prompt"),
    ("LTX25ModularPipeline", {"num_frames": 9}, "Use 17 frames"),
    ("LTX25ModularPipeline", {"height": 192}, "height 224 and width 768"),
    ("Wan22Image2VideoModularPipeline", {"has_last_image": True}, "last_image"),
]


@pytest.mark.parametrize(("pipeline", "asked", "fix"), NAMED, ids=str)
def test_what_a_newer_family_cannot_make_is_named(
    pipeline: str, asked: dict[str, Any], fix: str
) -> None:
    family = family_of(pipeline)
    with pytest.raises(ConfigError) as caught:
        has_last_image = asked.pop("has_last_image", False)
        wanted = VideoSettings(**{"prompt": "a cat", **asked})
        check_settings(wanted, family, family.limits({}), has_last_image=has_last_image)
    assert fix in caught.value.fix


def test_an_anyflow_whose_first_chunk_is_longer_than_a_photo_is_refused() -> None:
    configs = {"transformer": {"chunk_partition": (3, 3)}}
    with pytest.raises(ConfigError, match="first chunk of this AnyFlow has 3 latent frames"):
        family_of("AnyFlowFARPipeline").limits(configs)


@pytest.mark.parametrize("name", REFUSED)
def test_pipelines_of_videos_that_follow_more_than_a_photo_are_refused_by_name(name: str) -> None:
    with pytest.raises(ConfigError, match=f"`{name}` cannot be called from here: "):
        family_of(name)


ENDS = {
    "SkyReels-V2 DF": True,
    "FramePack": True,
    "MiniMax-H3": True,
    "Wan 2.1 modular": False,
    "Wan 2.2-A14B modular": False,
    "AnyFlow": False,
    "Helios": False,
}


@pytest.mark.parametrize(("name", "takes"), ENDS.items())
def test_a_newer_family_says_whether_its_videos_can_end_with_an_image(
    name: str, takes: bool
) -> None:
    family = BY_NAME[name]
    pipeline = tiny(family)
    load_weights(pipeline, family, other_weights(pipeline, family, seed=1))
    settings, options = asked_of(family, pipeline)
    settings = settings.changed(prompt=PROMPT, num_frames=limits_of(pipeline).nearest_num_frames(5))
    assert limits_of(pipeline).takes_last_image is takes
    ends = [photo(32), photo(32).crop((0, 0, 20, 20))]
    if not takes:
        with pytest.raises(ConfigError, match="cannot end a video with an image"):
            make_video(pipeline, photo(24), settings, last_image=ends[0])
        return
    if any(name.startswith("prompt_embeds") for name in options):
        settings = settings.changed(prompt=None)
    red, white = (
        make_video(pipeline, photo(24), settings, last_image=one, **options) for one in ends
    )
    assert not torch.equal(red, white)


def test_the_two_guiders_of_wan_2_2_have_a_guidance_each() -> None:
    family = BY_NAME["Wan 2.2-A14B modular"]
    pipeline, other = tiny(family), tiny(BY_NAME["Wan 2.1 modular"])
    settings, options = asked_of(family, pipeline, num_inference_steps=8, guidance_scale=3.5)
    both = settings.changed(guidance_scale_2=1.0)
    guiders = pipeline.guider, pipeline.guider_2
    video = make_video(pipeline, photo(24), both, **options)
    assert (pipeline.guider, pipeline.guider_2) == guiders
    assert not torch.equal(video, make_video(pipeline, photo(24), settings, **options))
    pipeline.guider = pipeline.guider.new(guidance_scale=3.5)
    pipeline.guider_2 = pipeline.guider_2.new(guidance_scale=1.0)
    by_hand = pipeline(
        image=fit_image(photo(24), 16, 16),
        prompt=PROMPT,
        num_inference_steps=8,
        generator=torch.Generator().manual_seed(0),
        output_type="pt",
        output="videos",
        height=16,
        width=16,
        num_frames=settings.num_frames,
        **options,
    )
    assert torch.equal(video, by_hand[0])
    with pytest.raises(ConfigError, match="no second denoiser"):
        make_video(other, photo(24), both)


def test_the_same_weights_make_the_same_video_in_a_modular_pipeline() -> None:
    """The modular Wan 2.2 and the one before it are two programs for one model."""
    import diffusers

    family = BY_NAME["Wan 2.2-A14B modular"]
    modular = tiny(family)
    settings, options = asked_of(family, modular, num_inference_steps=8, guidance_scale=5.0)
    names = ("transformer", "transformer_2", "vae", "text_encoder", "tokenizer", "scheduler")
    parts = {name: getattr(modular, name) for name in names}
    plain = diffusers.WanImageToVideoPipeline(**parts, boundary_ratio=0.875)
    plain.set_progress_bar_config(disable=True)
    video, expected = (
        make_video(pipeline, photo(24), settings, **options) for pipeline in (modular, plain)
    )
    torch.testing.assert_close(video, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["Wan 2.2-A14B modular", "LTX modular"])
def test_no_guidance_is_one_call_a_step(name: str) -> None:
    family = BY_NAME[name]
    pipeline, calls = tiny(family), 0

    def count(*_: Any) -> None:
        nonlocal calls
        calls += 1

    for denoiser in family.denoisers:
        getattr(pipeline, denoiser).register_forward_pre_hook(count)
    settings, options = asked_of(family, pipeline, guidance_scale=1.0, num_inference_steps=4)
    make_video(pipeline, photo(24), settings, **options)
    assert calls == 4
