"""Many videos share a switch of experts, and each is the video that a run of its own makes."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from PIL import Image
from torch import nn

from motionmerge.errors import ConfigError
from motionmerge.models.pocket.components import build_pocket_model
from motionmerge.models.pocket.world import load_photo
from motionmerge.sampling.pipelines.pocket import pipeline_from_model
from motionmerge.sampling.videos.make_video import encode_ahead, make_video
from motionmerge.sampling.videos.phases import Outcome, can_be_cut, make_videos
from motionmerge.sampling.videos.settings import VideoSettings
from motionmerge.schedule import ExpertSchedule
from motionmerge.switching.expert_bank import experts

from ..tiny.dynamicrafter import tiny_pipeline
from ..tiny.pipelines import FAMILIES, tiny

Weights = dict[str, torch.Tensor]


def moved(pipeline: object, seed: int) -> Weights:
    generator = torch.Generator().manual_seed(seed)
    return {
        f"{module}.{name}": value + 0.05 * torch.randn(value.shape, generator=generator)
        for module in ("unet", "image_projector")
        for name, value in getattr(pipeline, module).state_dict().items()
    }


def requests(
    *seeds: int, steps: int = 4, size: int = 16
) -> list[tuple[Image.Image, VideoSettings]]:
    image = Image.radial_gradient("L").resize((24, 20)).convert("RGB")
    asked = VideoSettings(
        prompt="a cat jumps", height=size, width=size, num_inference_steps=steps, guidance_scale=3.0
    )
    return [(image, asked.changed(seed=seed)) for seed in seeds]


def videos(outcomes: list[Outcome]) -> list[torch.Tensor]:
    assert [outcome.error for outcome in outcomes] == [None] * len(outcomes)
    return [outcome.video for outcome in sorted(outcomes, key=lambda o: o.index)]  # type: ignore[misc]


SCHEDULES = {
    "two": [{"expert": "a", "above": 0.64}, {"expert": "b"}],
    "back and forth": [
        {"expert": "a", "step_fraction": 0.25},
        {"expert": "b", "step_fraction": 0.75},
        {"expert": "a"},
    ],
    "one": [{"expert": "a"}],
}


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=list(SCHEDULES))
def test_videos_in_phases_equal_videos_one_by_one(schedule: list[dict[str, object]]) -> None:
    pipeline = tiny_pipeline()
    both = {"a": moved(pipeline, 1), "b": moved(pipeline, 2)}
    asked = [*requests(0, 1), *requests(2, steps=5), *requests(3, size=32)]
    scheduler = pipeline.scheduler
    with experts(pipeline, both, schedule=ExpertSchedule.from_list(schedule)) as bank:
        alone = [make_video(pipeline, image, settings) for image, settings in asked]
        together = videos(list(make_videos(pipeline, asked, bank)))
        assert pipeline.scheduler is scheduler
    assert all(torch.equal(left, right) for left, right in zip(alone, together, strict=True))
    assert not torch.equal(together[0], together[1])


def test_the_pocket_model_in_phases_equals_the_pocket_model() -> None:
    pipeline = pipeline_from_model(build_pocket_model(seed=0))
    pipeline.set_progress_bar_config(disable=True)
    both = {"a": moved(pipeline, 1), "b": moved(pipeline, 2)}
    asked = VideoSettings(prompt="the camera pans left", height=64, width=64, num_inference_steps=3)
    several = [(load_photo("coffee"), asked.changed(seed=seed)) for seed in range(2)]
    with experts(pipeline, both, boundary=0.8) as bank:
        alone = [make_video(pipeline, image, settings) for image, settings in several]
        together = videos(list(make_videos(pipeline, several, bank)))
    assert all(torch.equal(left, right) for left, right in zip(alone, together, strict=True))


def test_a_late_start_is_late_in_phases_too() -> None:
    pipeline = tiny_pipeline()
    both = {"a": moved(pipeline, 1), "b": moved(pipeline, 2)}
    asked = [(image, one.changed(start_step=900)) for image, one in requests(0, 1)]
    with experts(pipeline, both, boundary=0.64) as bank:
        alone = [make_video(pipeline, image, settings) for image, settings in asked]
        together = videos(list(make_videos(pipeline, asked, bank)))
        early = make_video(pipeline, *requests(0)[0])
    assert all(torch.equal(left, right) for left, right in zip(alone, together, strict=True))
    assert not torch.equal(alone[0], early)


def calls_of(pipeline: object) -> list[float]:
    """Record the mean of one weight, which tells experts apart, at every call of the U-Net."""
    seen: list[float] = []

    def record(unet: nn.Module, *_: object) -> None:
        seen.append(float(unet.conv_in.weight.mean()))

    pipeline.unet.register_forward_pre_hook(record)  # type: ignore[attr-defined]
    return seen


def test_experts_are_switched_once_for_all_videos() -> None:
    pipeline = tiny_pipeline()
    both = {"a": moved(pipeline, 1), "b": moved(pipeline, 2)}
    with experts(pipeline, both, boundary=0.64) as bank:
        seen = calls_of(pipeline)
        videos(list(make_videos(pipeline, requests(0, 1, 2), bank)))
    changes = sum(left != right for left, right in pairwise(seen))
    assert len(seen) == 2 * 3 * 4
    assert changes == 1


def test_a_video_that_fails_does_not_stop_the_others() -> None:
    pipeline = tiny_pipeline()
    both = {"a": moved(pipeline, 1), "b": moved(pipeline, 2)}
    good = requests(0, 1)
    bad = [(good[0][0], good[0][1].changed(height=17))]
    with experts(pipeline, both, boundary=0.64) as bank:
        alone = [make_video(pipeline, image, settings) for image, settings in good]
        found = list(make_videos(pipeline, [good[0], *bad, good[1]], bank))
    failed = [outcome for outcome in found if outcome.error is not None]
    assert [outcome.index for outcome in failed] == [1]
    assert isinstance(failed[0].error, ConfigError)
    made = {outcome.index: outcome.video for outcome in found if outcome.error is None}
    assert torch.equal(made[0], alone[0]) and torch.equal(made[2], alone[1])


def test_the_experts_are_gone_afterwards_even_if_nobody_takes_all_videos() -> None:
    pipeline = tiny_pipeline()
    before = {name: value.clone() for name, value in pipeline.unet.state_dict().items()}
    both = {"a": moved(pipeline, 1), "b": moved(pipeline, 2)}
    with experts(pipeline, both, boundary=0.64) as bank:
        first = make_videos(pipeline, requests(0, 1), bank)
        next(first)
        first.close()
    assert all(torch.equal(before[n], value) for n, value in pipeline.unet.state_dict().items())


def test_pipelines_that_keep_something_between_steps_make_one_video_after_another() -> None:
    family = next(family for family in FAMILIES if family.name == "Wan 2.1")
    assert can_be_cut(tiny_pipeline())
    assert not can_be_cut(tiny(family))


def encodings_of(pipeline: object) -> list[int]:
    """Record the size of every batch that the text encoder sees."""
    seen: list[int] = []
    encoder = pipeline.text_encoder  # type: ignore[attr-defined]
    encoder.register_forward_hook(lambda _, args, out: seen.append(len(out.last_hidden_state)))
    return seen


def test_prompts_are_encoded_once_for_all_experts() -> None:
    pipeline = tiny_pipeline()
    both = {"a": moved(pipeline, 1), "b": moved(pipeline, 2)}
    with experts(pipeline, both, boundary=0.64) as bank:
        seen = encodings_of(pipeline)
        videos(list(make_videos(pipeline, requests(0, 1), bank)))
    assert seen == [1] * 2 * 2  # a prompt and its negative, for each of two videos


def test_what_is_encoded_ahead_makes_the_same_videos_with_half_the_encodings() -> None:
    pipeline = tiny_pipeline()
    image, first = requests(0)[0]
    wanted = [
        first.changed(prompt=prompt, seed=seed, guidance_scale=scale)
        for prompt, scale in (("a cat jumps", 3.0), ("up", 1.0))
        for seed in range(2)
    ]
    expected = [make_video(pipeline, image, settings) for settings in wanted]
    seen = encodings_of(pipeline)
    ahead = encode_ahead(pipeline, image, wanted)
    assert seen == [1] * 3
    assert pipeline.text_encoder is None and pipeline.image_encoder is None
    for settings, conditions, video in zip(wanted, ahead, expected, strict=True):
        made = make_video(pipeline, image, settings, conditions=conditions)
        assert torch.equal(made, video)


def test_other_pipelines_keep_their_encoders() -> None:
    pipeline = tiny(next(family for family in FAMILIES if family.name == "Wan 2.1"))
    image, settings = requests(0)[0]
    assert encode_ahead(pipeline, image, [settings, settings]) == [None, None]
    assert pipeline.text_encoder is not None
