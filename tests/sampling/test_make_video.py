"""Every family's pipeline is called by the names of its own arguments, within its own limits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers import CLIPTextConfig, CLIPTextModel

from motionmerge.errors import ConfigError, DataError
from motionmerge.io.video import fit_image
from motionmerge.parameter_groups import FAMILIES as MODEL_FAMILIES
from motionmerge.sampling.batch.manifest import read_prompts
from motionmerge.sampling.families.families import (
    POCKET,
    VIDEO_FAMILIES,
    configs_of,
    family_of,
)
from motionmerge.sampling.families.limits import Limits, VideoFamily
from motionmerge.sampling.videos.checks import check_settings
from motionmerge.sampling.videos.make_video import (
    encode_ahead,
    frames_of,
    make_video,
    named_memory_errors,
    pipeline_arguments,
    prepared,
)
from motionmerge.sampling.videos.settings import VideoSettings

from ..tiny.builders import WORDS, tokenizer
from ..tiny.dynamicrafter import tiny_pipeline
from ..tiny.pipelines import (
    FAMILIES,
    PROMPT,
    Family,
    load_weights,
    other_weights,
    photo,
    tiny,
)

IN_SETTINGS = {"image", "prompt", "negative_prompt", "height", "width", "num_frames"}
GUIDANCE = {"SVD": "max_guidance_scale", "Hunyuan": "true_cfg_scale"}


def in_words_of_the_pipeline(pipeline: Any, family: Family) -> dict[str, Any]:
    """Write the call out by hand, as the tests of the experts do."""
    arguments = family.inputs(1)
    if family.name == "Hunyuan 1.5":
        pipeline.guider = pipeline.guider.new(guidance_scale=3.0)
        return {**arguments, "image": photo(24)}
    size = arguments["height"], arguments["width"]
    return {
        **arguments,
        "image": fit_image(photo(24), *size),
        GUIDANCE.get(family.name, "guidance_scale"): 3.0,
    }


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_a_video_is_the_one_that_the_pipeline_makes_itself(family: Family) -> None:
    pipeline = tiny(family)
    by_hand = in_words_of_the_pipeline(pipeline, family)
    with torch.random.fork_rng():
        torch.manual_seed(5)
        expected = pipeline(
            **by_hand,
            num_inference_steps=2,
            generator=torch.Generator().manual_seed(5),
            output_type="pt",
        ).frames[0]

    pipeline = tiny(family)
    inputs = family.inputs(1)
    asked = VideoSettings(
        seed=5,
        num_inference_steps=2,
        guidance_scale=3.0,
        prompt=inputs["prompt"][0] if "prompt" in inputs else None,
        negative_prompt=inputs["negative_prompt"][0] if "prompt" in inputs else None,
        **{name: inputs[name] for name in ("height", "width", "num_frames") if name in inputs},
    )
    said = IN_SETTINGS | set(GUIDANCE.values())
    options = {name: value for name, value in inputs.items() if name not in said}
    guider = getattr(pipeline, "guider", None)
    video = make_video(pipeline, photo(24), asked, **options)
    assert video.ndim == 4
    assert torch.equal(video, expected.float())
    assert getattr(pipeline, "guider", None) is guider
    assert 0 <= float(video.min()) < float(video.max()) <= 1


def test_every_family_of_models_can_be_called() -> None:
    with_the_names_of_another = {"pocket", "videocrafter"}
    assert {family.name for family in VIDEO_FAMILIES} - with_the_names_of_another == {
        family.name for family in MODEL_FAMILIES
    }


@pytest.mark.parametrize("name", ["SVD", "I2VGen-XL", "LTX", "LTX-2"])
def test_a_model_that_knows_frame_rates_is_told(name: str) -> None:
    pipeline = tiny(next(family for family in FAMILIES if family.name == name))
    told = {"SVD": "fps", "I2VGen-XL": "target_fps"}.get(name, "frame_rate")
    arguments = pipeline_arguments(pipeline, photo(32), VideoSettings(frame_rate=12))
    assert arguments[told] == 12
    assert told not in pipeline_arguments(pipeline, photo(32), VideoSettings())


def test_i2vgen_xl_reads_prompts_by_the_last_layer_but_one() -> None:
    pipeline = tiny(next(family for family in FAMILIES if family.name == "I2VGen-XL"))
    config = CLIPTextConfig(
        vocab_size=len(WORDS),
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=16,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        tower = CLIPTextModel(config).eval()
    pipeline.register_modules(text_encoder=tower, tokenizer=tokenizer())
    asked = VideoSettings(prompt="a cat jumps", negative_prompt="the camera pans left")
    arguments = pipeline_arguments(pipeline, photo(32), asked)

    tower.encoder.layers = tower.encoder.layers[:1]  # the same, by leaving the last layer out
    for name, prompt in (
        ("prompt_embeds", asked.prompt),
        ("negative_prompt_embeds", asked.negative_prompt),
    ):
        tokens = pipeline.tokenizer(
            [prompt], padding="max_length", max_length=16, return_tensors="pt"
        )
        assert torch.allclose(arguments[name], tower(tokens.input_ids).last_hidden_state, atol=1e-6)
    assert not torch.equal(arguments["prompt_embeds"], arguments["negative_prompt_embeds"])


NAMED = [
    ("WanImageToVideoPipeline", {"height": 470, "width": 830}, "height 464 and width 832"),
    ("WanImageToVideoPipeline", {"num_frames": 80}, "Use 81 frames"),
    ("StableVideoDiffusionPipeline", {"width": 1000}, "height 576 and width 1024"),
    ("StableVideoDiffusionPipeline", {"frame_rate": 7.6}, "Use 8 frames per second"),
    ("StableVideoDiffusionPipeline", {"prompt": "a cat"}, "Leave `prompt`"),
    ("StableVideoDiffusionPipeline", {"num_frames": 1}, "Use 2 frames"),
    ("CogVideoXImageToVideoPipeline", {"num_frames": 48}, "Use 49 frames"),
    ("CogVideoXImageToVideoPipeline", {"num_frames": 45}, "Use 49 frames"),
    ("CogVideoXImageToVideoPipeline", {"num_frames": 13}, "Use 17 frames"),
    ("CogVideoXImageToVideoPipeline", {"num_frames": 5}, "Use 9 frames"),
    ("LTXImageToVideoPipeline", {"num_frames": 160}, "Use 161 frames"),
    ("LTXImageToVideoPipeline", {"frame_rate": 1000}, "Use 120 frames per second"),
    ("LTX2ImageToVideoPipeline", {"height": 500}, "height 512 and width 768"),
    ("HunyuanVideoImageToVideoPipeline", {"num_frames": 130}, "Use 129 frames"),
    ("HunyuanVideo15ImageToVideoPipeline", {"height": 480}, "Leave height and width out"),
    ("SkyReelsV2ImageToVideoPipeline", {"frame_rate": 0}, "Use 1 frames per second"),
    ("Kandinsky5I2VPipeline", {"width": 760}, "height 512 and width 768"),
    ("Kandinsky5I2VPipeline", {"num_frames": 13}, "Use 17 frames"),
    ("Kandinsky5I2VPipeline", {"num_frames": 1}, "Use 17 frames"),
    ("DynamiCrafterPipeline", {"num_frames": 32}, "Use 16 frames"),
    ("PocketPipeline", {"height": 64, "width": 200}, "height 128 and width 128"),
    ("PocketPipeline", {"height": 1, "width": 1}, "height 64 and width 64"),
    ("WanImageToVideoPipeline", {"height": 1}, "height 16 and width 832"),
    ("WanImageToVideoPipeline", {"prompt": None}, "`prompt`"),
    ("WanImageToVideoPipeline", {"guidance_scale_2": 1.0}, "`guidance_scale_2`"),
    ("LTXImageToVideoPipeline", {"guidance_scale_2": 3.5}, "`guidance_scale_2`"),
    ("WanImageToVideoPipeline", {"start_step": 940}, "`start_step`"),
    ("DynamiCrafterPipeline", {"start_step": 49}, "Begin earlier"),
    ("DynamiCrafterPipeline", {"start_step": 9, "num_inference_steps": 10}, "Begin earlier"),
    ("PocketPipeline", {"has_last_image": True}, "`last_image`"),
    ("Kandinsky5I2VPipeline", {"has_last_image": True}, "`last_image`"),
    ("WanImageToVideoPipeline", {"has_last_image": True, "num_frames": 1}, "more frames"),
]


@pytest.mark.parametrize(("pipeline", "asked", "fix"), NAMED, ids=str)
def test_what_a_family_cannot_make_is_named_with_the_nearest_right_values(
    pipeline: str, asked: dict[str, Any], fix: str
) -> None:
    family = family_of(pipeline)
    text = {"prompt": "a cat"} if family.takes_text else {}
    with pytest.raises(ConfigError) as caught:
        has_last_image = asked.pop("has_last_image", False)
        wanted = VideoSettings(**{**text, **asked})
        check_settings(wanted, family, family.limits({}), has_last_image=has_last_image)
    assert fix in caught.value.fix


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"seed": 2**63}, "seed is 9223372036854775808; expected 0 to 9223372036854775807"),
        ({"seed": -1}, "seed is -1"),
        ({"seed": True}, "seed is True"),
        ({"height": 0}, "height is 0; expected 1 to 65536"),
        ({"width": 10**9}, "width is 1000000000"),
        ({"num_frames": 0}, "num_frames is 0"),
        ({"num_inference_steps": 0}, "num_inference_steps is 0; expected 1 to 1000"),
        ({"guidance_scale": -5}, r"guidance_scale is -5\.0; expected 0 to 1000"),
        ({"guidance_scale": float("nan")}, "guidance_scale is nan"),
        ({"guidance_scale": float("inf")}, "guidance_scale is inf"),
        ({"guidance_scale_2": float("nan")}, "guidance_scale_2 is nan"),
        ({"guidance_scale_2": True}, "guidance_scale_2 is True"),
        ({"start_step": 0}, "start_step is 0; expected 1 to 1000"),
        ({"start_step": 1001}, "start_step is 1001"),
        ({"start_step": 900.5}, "start_step"),
        ({"frame_rate": True}, "frame_rate is True"),
        ({"prompt": "pans \udcff left"}, r"prompt has a broken character at position 5"),
        ({"negative_prompt": "\ud800"}, "negative_prompt has a broken character"),
    ],
    ids=str,
)
def test_settings_that_no_model_could_follow_are_refused(
    asked: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        VideoSettings(**asked)
    with pytest.raises(ConfigError, match=message):
        VideoSettings().changed(**asked)


def test_the_largest_seed_makes_a_video() -> None:
    pipeline = tiny(next(family for family in FAMILIES if family.name == "LTX"))
    asked = VideoSettings(prompt="a cat", seed=2**63 - 1)
    arguments = pipeline_arguments(pipeline, photo(32), asked)
    assert arguments["generator"].initial_seed() == 2**63 - 1


GUIDED = {"guidance_embeds": False}
IGNORED = [
    ("PocketPipeline", None, {}),
    ("PocketPipeline", 1.0, {}),
    ("WanImageToVideoPipeline", 1.0, {}),
    ("DynamiCrafterPipeline", 0.5, {}),
    ("HunyuanVideo15ImageToVideoPipeline", 1.0, {}),
    ("HunyuanVideoImageToVideoPipeline", None, GUIDED),
    ("HunyuanVideoImageToVideoPipeline", 6.0, {"guidance_embeds": True}),
]
READ = [
    ("PocketPipeline", 1.5, {}),
    ("WanImageToVideoPipeline", None, {}),
    ("DynamiCrafterPipeline", None, {}),
    ("LTX2ImageToVideoPipeline", 1.0, {}),
    ("HunyuanVideo15ImageToVideoPipeline", 0.5, {}),
    ("HunyuanVideoImageToVideoPipeline", 6.0, GUIDED),
]


@pytest.mark.parametrize(("pipeline", "scale", "transformer"), IGNORED, ids=str)
def test_a_negative_prompt_that_would_do_nothing_is_refused(
    pipeline: str, scale: float | None, transformer: dict[str, Any]
) -> None:
    family = family_of(pipeline)
    limits = family.limits({"transformer": transformer})
    asked = VideoSettings(prompt="a cat", negative_prompt="a dog", guidance_scale=scale)
    with pytest.raises(ConfigError, match="negative prompt") as caught:
        check_settings(asked, family, limits)
    assert "`negative_prompt`" in caught.value.fix
    assert ("`guidance_scale`" in caught.value.fix) is not limits.is_distilled
    check_settings(asked.changed(negative_prompt=""), family, limits)
    with pytest.raises(ConfigError, match="negative prompt"):
        check_settings(asked.resolved(family, limits), family, limits)


@pytest.mark.parametrize(("pipeline", "scale", "transformer"), READ, ids=str)
def test_a_negative_prompt_that_is_read_is_allowed(
    pipeline: str, scale: float | None, transformer: dict[str, Any]
) -> None:
    family = family_of(pipeline)
    limits = family.limits({"transformer": transformer})
    asked = VideoSettings(prompt="a cat", negative_prompt="a dog", guidance_scale=scale)
    check_settings(asked, family, limits)
    check_settings(asked.resolved(family, limits), family, limits)


def of_two_negative_prompts(
    pipeline: Any, family: Family, scale: float | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Make two videos that differ by the negative prompt alone, unchecked."""
    inputs = family.inputs(1)
    size = {name: inputs[name] for name in ("height", "width", "num_frames") if name in inputs}
    asked = VideoSettings(guidance_scale=scale, num_inference_steps=2, **size)
    own = {k: v for k, v in inputs.items() if k not in ("image", "true_cfg_scale", *size)}
    other = {
        name: -value if torch.is_tensor(value) and value.is_floating_point() else value
        for name, value in own.items()
        if name.startswith("negative")
    }
    if "negative_prompt" in other:
        other["negative_prompt"] = [PROMPT]
    videos = []
    for negative in ({}, other):
        arguments = pipeline_arguments(pipeline, photo(24), asked)
        with prepared(pipeline, asked):
            videos.append(frames_of(pipeline(**{**arguments, **own, **negative})))
    return videos[0], videos[1]


@pytest.mark.parametrize("family", FAMILIES[1:], ids=lambda family: family.name)
def test_a_family_says_when_negative_prompts_are_read(family: Family) -> None:
    pipeline = tiny(family)
    moved = other_weights(pipeline, family, seed=1)  # at first Kandinsky's text does nothing
    load_weights(pipeline, family, moved)
    called = family_of(type(pipeline).__name__)
    for scale in (None, 0.5, 1.0):
        video, other = of_two_negative_prompts(pipeline, family, scale)
        assert torch.equal(video, other) is not called.is_guided(scale), scale


def test_a_distilled_hunyuan_reads_no_negative_prompt() -> None:
    family = next(family for family in FAMILIES if family.name == "Hunyuan")
    pipeline = tiny(family)
    config = {**pipeline.transformer.config, "guidance_embeds": True}
    pipeline.transformer = type(pipeline.transformer).from_config(config).eval()
    assert torch.equal(*of_two_negative_prompts(pipeline, family, 6.0))
    assert family_of(type(pipeline).__name__).limits(configs_of(pipeline)).is_distilled


def test_guidance_among_the_options_lets_a_negative_prompt_be_read() -> None:
    pipeline = tiny_pipeline()
    asked = VideoSettings(
        prompt="a cat",
        negative_prompt="up",
        guidance_scale=1.0,
        num_inference_steps=1,
        height=16,
        width=16,
    )
    with pytest.raises(ConfigError, match="negative prompt"):
        make_video(pipeline, photo(24), asked)
    video = make_video(pipeline, photo(24), asked, guidance_scale=3.0)
    other = asked.changed(negative_prompt="left")
    assert not torch.equal(video, make_video(pipeline, photo(24), other, guidance_scale=3.0))


def test_the_second_guidance_of_wan_2_2_is_that_of_its_second_transformer() -> None:
    family = next(family for family in FAMILIES if family.name == "Wan 2.2-A14B")
    pipeline, size = tiny(family), {"height": 16, "width": 16, "num_frames": 9}
    asked = VideoSettings(prompt=PROMPT, num_inference_steps=8, guidance_scale=3.5, **size)
    both = asked.changed(guidance_scale_2=1.0)
    video = make_video(pipeline, photo(24), both)
    expected = pipeline(
        image=fit_image(photo(24), 16, 16),
        prompt=PROMPT,
        num_inference_steps=8,
        guidance_scale=3.5,
        guidance_scale_2=1.0,
        generator=torch.Generator().manual_seed(0),
        output_type="pt",
        **size,
    ).frames[0]
    assert torch.equal(video, expected)
    assert not torch.equal(video, make_video(pipeline, photo(24), asked))
    assert torch.equal(video, make_video(pipeline, photo(24), asked, guidance_scale_2=1.0))
    with pytest.raises(
        ConfigError, match=r"no guidance at any noise level.*\n.*`guidance_scale_2`"
    ):
        make_video(pipeline, photo(24), asked.changed(guidance_scale=1.0, guidance_scale_2=3.5))


def test_settings_that_came_later_are_not_written_where_they_say_nothing() -> None:
    assert list(VideoSettings(prompt="a cat").model_dump()) == [
        "prompt",
        "seed",
        "negative_prompt",
        "height",
        "width",
        "num_frames",
        "frame_rate",
        "num_inference_steps",
        "guidance_scale",
    ]
    newer = {"guidance_scale_2": 1.0, "start_step": 940}
    assert newer.items() <= VideoSettings(**newer).model_dump().items()


def between_two_images(name: str) -> Any:
    """A tiny Wan or SkyReels with positions for the tokens of two images."""
    pipeline = tiny(next(family for family in FAMILIES if family.name == name))
    config = {k: v for k, v in pipeline.transformer.config.items() if not k.startswith("_")}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        both = type(pipeline.transformer)(**{**config, "pos_embed_seq_len": 2 * 5})
    pipeline.transformer = both.eval()
    return pipeline


ENDS = {
    "Wan 2.2-A14B": (lambda: tiny(FAMILIES[4]), True, False),
    "Wan 2.2-5B": (lambda: tiny(FAMILIES[5]), False, False),
    "Wan 2.1": (lambda: tiny(FAMILIES[3]), False, False),
    "Wan 2.1-FLF2V": (lambda: between_two_images("Wan 2.1"), True, True),
    "SkyReels-V2": (lambda: tiny(FAMILIES[10]), False, False),
    "SkyReels-V2 of two images": (lambda: between_two_images("SkyReels-V2"), True, True),
    "DynamiCrafter": (tiny_pipeline, True, False),
}


@pytest.mark.parametrize(("build", "takes", "needs"), ENDS.values(), ids=list(ENDS))
def test_a_family_says_whether_its_videos_can_end_with_an_image(
    build: Any, takes: bool, needs: bool
) -> None:
    pipeline = build()
    limits = family_of(type(pipeline).__name__).limits(configs_of(pipeline))
    assert (limits.takes_last_image, limits.needs_last_image) == (takes, needs)
    asked = VideoSettings(prompt=PROMPT, num_inference_steps=2, height=32, width=32)
    asked = asked.changed(num_frames=limits.nearest_num_frames(5))
    others = [Image.new("RGB", (32, 32), colour) for colour in ("red", "white")]
    if not takes:
        with pytest.raises(ConfigError, match="cannot end a video with an image"):
            make_video(pipeline, photo(32), asked, last_image=others[0])
        return
    red, white = (make_video(pipeline, photo(32), asked, last_image=one) for one in others)
    assert red.isfinite().all() and not torch.equal(red, white)
    if needs:
        with pytest.raises(ConfigError, match="between two images"):
            make_video(pipeline, photo(32), asked)
        return
    assert not torch.equal(red, make_video(pipeline, photo(32), asked))


def test_a_wan_2_2_5b_would_not_read_a_last_image() -> None:
    family = next(family for family in FAMILIES if family.name == "Wan 2.2-5B")
    pipeline, last = tiny(family), Image.new("RGB", (32, 32), "red")
    arguments = pipeline_arguments(
        pipeline, photo(32), VideoSettings(prompt="a", height=32, width=32, num_frames=5)
    )
    videos = [
        frames_of(
            pipeline(
                **{
                    **arguments,
                    "num_inference_steps": 1,
                    "generator": torch.Generator().manual_seed(0),
                    **more,
                }
            )
        )
        for more in ({}, {"last_image": last})
    ]
    assert torch.equal(*videos)


@pytest.mark.parametrize("is_late", [False, True])
def test_a_dynamicrafter_is_told_of_its_last_image_and_its_start(is_late: bool) -> None:
    pipeline, last = tiny_pipeline(), Image.new("RGB", (16, 16), "red")
    asked = VideoSettings(prompt="a cat", num_inference_steps=2, height=16, width=16, num_frames=3)
    start = {"start_step": 900} if is_late else {}
    expected = pipeline(
        fit_image(photo(24), 16, 16),
        "a cat",
        last_image=last,
        num_inference_steps=2,
        num_frames=3,
        generator=torch.Generator().manual_seed(0),
        output_type="pt",
        **start,
    ).frames[0]
    asked = asked.changed(**start)
    assert torch.equal(make_video(pipeline, photo(24), asked, last_image=last), expected)
    (conditions,) = encode_ahead(pipeline, photo(24), [asked], last_image=last)
    video = make_video(pipeline, photo(24), asked, last_image=last, conditions=conditions)
    assert torch.equal(video, expected)


def nearest(family: VideoFamily, limits: Limits, asked: dict[str, Any]) -> dict[str, Any]:
    height, width = limits.nearest_size(asked["height"], asked["width"])
    return {
        "height": height,
        "width": width,
        "num_frames": limits.nearest_num_frames(asked["num_frames"]),
    }


def three_shortest(limits: Limits) -> list[int]:
    shortest = range(limits.min_frames, 4 * limits.frame_multiple + limits.min_frames)
    return [n for n in shortest if limits.nearest_num_frames(n) == n][:3]


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_the_shortest_videos_have_the_frames_asked_for(family: Family) -> None:
    pipeline, inputs = tiny(family), family.inputs(1)
    limits = family_of(type(pipeline).__name__).limits(configs_of(pipeline))
    asked = VideoSettings(
        prompt=PROMPT if "prompt" in inputs else None,
        num_inference_steps=2,
        **{name: inputs[name] for name in ("height", "width") if name in inputs},
    )
    options = {name: value for name, value in inputs.items() if name not in IN_SETTINGS}
    for num_frames in three_shortest(limits):
        video = make_video(pipeline, photo(24), asked.changed(num_frames=num_frames), **options)
        assert len(video) == num_frames - limits.dropped_frames > 0
        assert video.isfinite().all()


def test_a_hunyuan_that_is_shown_its_image_as_a_latent_drops_its_frames() -> None:
    limits = family_of("HunyuanVideoImageToVideoPipeline").limits
    shown = limits({"transformer": {"image_condition_type": "latent_concat"}})
    replaced = limits({"transformer": {"image_condition_type": "token_replace"}})
    assert (three_shortest(shown), shown.dropped_frames) == ([5, 9, 13], 4)
    assert (three_shortest(replaced), replaced.dropped_frames) == ([1, 5, 9], 0)


def test_kandinskys_sparse_attention_needs_larger_multiples() -> None:
    limits = family_of("Kandinsky5I2VPipeline").limits
    assert limits({"transformer": {"attention_type": "nabla"}}).size_multiple == 128


@given(
    family=st.sampled_from(VIDEO_FAMILIES),
    asked=st.fixed_dictionaries(
        dict.fromkeys(("height", "width", "num_frames"), st.integers(1, 5000))
    ),
)
@settings(max_examples=200, deadline=None)
def test_the_nearest_right_values_are_right(family: VideoFamily, asked: dict[str, Any]) -> None:
    limits = family.limits({})
    text = {"prompt": "a cat"} if family.takes_text else {}
    found = nearest(family, limits, asked)
    check_settings(VideoSettings(**text, **found), family, limits)
    assert nearest(family, limits, {**asked, **{k: v for k, v in found.items() if v}}) == found


@pytest.mark.parametrize("family", VIDEO_FAMILIES, ids=lambda family: family.name)
def test_what_a_family_makes_by_itself_is_allowed(family: VideoFamily) -> None:
    limits = family.limits({})
    asked = VideoSettings(
        height=limits.height,
        width=limits.width,
        num_frames=limits.num_frames,
        frame_rate=limits.frame_rate,
        prompt="a cat" if family.takes_text else None,
    )
    check_settings(asked, family, limits)


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_limits_follow_from_the_parts_of_a_pipeline(family: Family) -> None:
    pipeline, inputs = tiny(family), family.inputs(1)
    called = family_of(type(pipeline).__name__)
    limits = called.limits(configs_of(pipeline))
    assert limits.nearest_num_frames(inputs["num_frames"]) == inputs["num_frames"]
    if "height" in inputs:
        asked = inputs["height"], inputs["width"]
        assert limits.nearest_size(*asked) == asked


def test_a_pipeline_of_no_family_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ConfigError, match="FluxPipeline") as caught:
        family_of("FluxPipeline")
    assert "WanImageToVideoPipeline" in caught.value.fix


def test_running_out_of_memory_says_what_to_do() -> None:
    limits = POCKET.limits({})
    for ask_for_too_much in (
        lambda: torch.empty(1 << 50, dtype=torch.uint8),
        lambda: bytearray(1 << 60),
    ):
        with (
            pytest.raises(ConfigError, match="Memory ran out") as caught,
            named_memory_errors(limits),
        ):
            ask_for_too_much()
        assert "fewer frames" in caught.value.fix
    with pytest.raises(RuntimeError, match="shape"), named_memory_errors(limits):
        torch.ones(2) @ torch.ones(3, 3)


def test_prompts_are_read_one_a_line() -> None:
    assert read_prompts(" a cat \n\n\na dog", source="p.txt") == ["a cat", "a dog"]
    with pytest.raises(DataError, match=r"p\.txt"):
        read_prompts(" \n", source="p.txt")


def test_prompts_end_at_newlines_alone_and_a_byte_order_mark_is_none() -> None:
    text = "\ufeffa cat\r\na\u2028dog\ra\x85\x0b\x1cbird\n"
    assert read_prompts(text, source="p.txt") == ["a cat", "a\u2028dog", "a\x85\x0b\x1cbird"]


@pytest.mark.parametrize("name", ["SVD", "Wan 2.1", "Hunyuan 1.5"])
def test_an_image_of_any_mode_is_made_rgb(name: str) -> None:
    pipeline = tiny(next(family for family in FAMILIES if family.name == name))
    for mode in ("1", "L", "P", "I;16", "LA", "RGBA", "CMYK"):
        image = photo(32).convert("L").convert(mode) if mode == "I;16" else photo(32).convert(mode)
        arguments = pipeline_arguments(pipeline, image, VideoSettings())
        assert arguments["image"].mode == "RGB"
    with pytest.raises(DataError, match="The image is a Tensor"):
        pipeline_arguments(pipeline, torch.zeros(3, 32, 32), VideoSettings())  # type: ignore[arg-type]


def test_an_image_of_another_shape_is_cut_to_the_video() -> None:
    family = next(family for family in FAMILIES if family.name == "LTX")
    wide = Image.new("RGB", (100, 40), "red")
    arguments = pipeline_arguments(
        tiny(family), wide, VideoSettings(prompt="a", height=32, width=64)
    )
    assert arguments["image"].size == (64, 32)
