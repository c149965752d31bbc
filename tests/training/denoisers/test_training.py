"""LoRAs of every family: they reach all of its layers, and diffusers loads what was trained."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch

from motionmerge.models.video_pipeline import VideoPipeline
from motionmerge.parameter_groups import FAMILIES
from motionmerge.sampling.families.families import family_of
from motionmerge.training.denoisers.choice import denoiser_for
from motionmerge.training.denoisers.condition import DenoiserCondition
from motionmerge.training.denoisers.encoding import encode_condition
from motionmerge.training.denoisers.family import FamilyDenoiser
from motionmerge.training.parameters import LoraShape, choose_parameters, trained_state

from ...tiny.pipelines import PROMPT, Family, tiny
from .test_families import TRAINED, clip_of, every_family, text_of

_TEXT_OUT = re.compile(r"to_add_out|ff_context")
LOADED_BY_DIFFUSERS = ("CogVideoX", "Wan 2.1", "LTX", "Hunyuan")


def groups_of(pipeline: VideoPipeline) -> Any:
    name = family_of(type(pipeline).__name__).name
    return next(family for family in FAMILIES if family.name == name)


def noisy_of(condition: DenoiserCondition, denoiser: FamilyDenoiser, family: Family) -> Any:
    frames = max(condition.latents.shape[2], 3 if denoiser.given_frames else 1)
    channels = {"Wan 2.1": 16, "SkyReels-V2": 16, "Wan 2.2-A14B": 16, "Wan 2.2-5B": 48, "LTX": 8}
    size = condition.latents.shape[3:]
    generator = torch.Generator().manual_seed(1)
    shape = (1, channels.get(family.name, 4), frames, *size)
    return torch.randn(shape, generator=generator)


@every_family
def test_a_lora_reaches_every_layer_and_begins_with_the_same_bits(family: Family) -> None:
    pipeline = tiny(family)
    denoiser = denoiser_for(pipeline).requires_grad_(False)
    condition = encode_condition(
        pipeline, denoiser, clip_of(family), PROMPT, frame_rate=8, **text_of(family)
    )
    noisy = noisy_of(condition, denoiser, family).requires_grad_()
    times = torch.tensor([950.0])
    before = denoiser(noisy, times, condition)
    network = family.denoisers[0]
    trained = choose_parameters(
        denoiser, groups_of(pipeline), f"{network}.*", lora=LoraShape(rank=2)
    )
    after = denoiser(noisy, times, condition)
    assert torch.equal(after, before)
    after[:, :, denoiser.given_frames :].square().mean().backward()
    unreached = [
        name
        for name, one in zip(trained.names, trained.parameters, strict=True)
        # Nothing reads the text that leaves the last block of Hunyuan 1.5.
        if one.grad is None and not (family.name == "Hunyuan 1.5" and _TEXT_OUT.search(name))
    ]
    assert not unreached


@pytest.mark.parametrize(
    "family",
    [one for one in TRAINED if one.name in LOADED_BY_DIFFUSERS],
    ids=lambda family: family.name,
)
def test_diffusers_loads_what_was_trained(family: Family) -> None:
    pipeline = tiny(family)
    denoiser = denoiser_for(pipeline)
    condition = encode_condition(
        pipeline, denoiser, clip_of(family), PROMPT, frame_rate=8, **text_of(family)
    )
    shape = LoraShape(rank=2, alpha=3)
    trained = choose_parameters(denoiser, groups_of(pipeline), "all", lora=shape)
    noisy, times = noisy_of(condition, denoiser, family), torch.tensor([500.0])
    fresh = tiny(family)
    other = denoiser_for(fresh)
    with torch.no_grad():
        for one in trained.parameters:
            one.normal_(std=0.3, generator=torch.Generator().manual_seed(one.numel()))
        tuned, plain = (part(noisy, times, condition) for part in (denoiser, other))
        fresh.load_lora_weights(trained_state(denoiser, trained))
        loaded = other(noisy, times, condition)
    torch.testing.assert_close(loaded, tuned, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(plain, tuned, atol=1e-2)
