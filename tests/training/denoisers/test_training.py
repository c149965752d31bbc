"""LoRAs of every family: they reach all of its layers, and diffusers loads what was trained."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from transformers import CLIPTextModel

from motionmerge.io.weights import save_weights
from motionmerge.merging.recipes.recipe import Recipe
from motionmerge.models.dynamicrafter.encoders import text_encoder_config
from motionmerge.models.text_adapters import add_text_adapter
from motionmerge.models.video_pipeline import VideoPipeline
from motionmerge.parameter_groups import FAMILIES, SVD
from motionmerge.sampling.families.families import family_of
from motionmerge.sampling.pipelines.svd_adapter import SvdAdapterPipeline
from motionmerge.switching.expert_bank import experts
from motionmerge.training.denoisers.choice import denoiser_for
from motionmerge.training.denoisers.condition import DenoiserCondition, plain_condition
from motionmerge.training.denoisers.encoding import encode_condition
from motionmerge.training.denoisers.family import FamilyDenoiser
from motionmerge.training.parameters import (
    LoraShape,
    choose_parameters,
    trained_header,
    trained_state,
)

from ...tiny.builders import WORDS, tokenizer
from ...tiny.pipelines import PROMPT, Family, tiny
from .test_families import TRAINED, clip_of, every_family, text_of

_TEXT_OUT = re.compile(r"to_add_out|ff_context")
LOADED_BY_DIFFUSERS = ("CogVideoX", "Wan 2.1", "Wan 2.2-A14B", "Wan 2.2-5B", "LTX", "Hunyuan")


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
def test_a_lora_reaches_every_layer_and_experts_read_it_back(family: Family, tmp_path: Any) -> None:
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
        denoiser, groups_of(pipeline), f"{network}.*", lora=LoraShape(rank=2, alpha=3)
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

    file = tmp_path / "lora.safetensors"
    fresh = tiny(family)
    other = denoiser_for(fresh).requires_grad_(False)
    clean = torch.tensor([100.0])  # where Wan 2.2-A14B has another network
    with torch.no_grad():
        for one in trained.parameters:
            one.normal_(std=0.3, generator=torch.Generator().manual_seed(one.numel()))
        state = trained_state(denoiser, trained)
        save_weights(file, state, trained_header(trained))
        tuned = [denoiser(noisy, time, condition) for time in (times, clean)]
        with experts(fresh, Recipe.of_loras({"all": 1.0}, {"style": file})):
            read = [other(noisy, time, condition) for time in (times, clean)]
        if family.name in LOADED_BY_DIFFUSERS:
            fresh.load_lora_weights(state)
            loaded = other(noisy, times, condition)
            torch.testing.assert_close(loaded, tuned[0], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(read, tuned, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(tuned[0], before, atol=1e-2)


def adapted(family: Family) -> Any:
    """Make a tiny pipeline with a fresh adapter."""
    pipeline = tiny(family)
    add_text_adapter(pipeline.unet, text_dim=8, num_frames=2, num_heads=2, head_dim=4)
    if family.name != "SVD":
        return pipeline
    size = {"width": 8, "layers": 1, "heads": 2, "num_tokens": 16, "vocab_size": len(WORDS)}
    tower = CLIPTextModel(text_encoder_config(**size)).eval()
    return SvdAdapterPipeline.around(pipeline, text_encoder=tower, tokenizer=tokenizer())


@pytest.mark.parametrize(
    "family",
    [one for one in TRAINED if one.name in ("SVD", "I2VGen-XL")],
    ids=lambda family: family.name,
)
def test_an_adapter_is_trained_from_no_effect_on(family: Family) -> None:
    plain, pipeline, clip = tiny(family), adapted(family), clip_of(family)
    text = text_of(family)
    denoiser = denoiser_for(pipeline).requires_grad_(False)
    condition = encode_condition(pipeline, denoiser, clip, PROMPT, frame_rate=8, **text)
    assert condition.prompt_embeds.shape[1:] == ((16, 8) if family.name == "SVD" else (4, 8))
    noisy, times = noisy_of(condition, denoiser, family), torch.tensor([0.5])
    with torch.no_grad():
        before = denoiser_for(plain).requires_grad_(False)(noisy, times, condition)
        assert torch.equal(denoiser(noisy, times, condition), before)
    trained = choose_parameters(denoiser, groups_of(pipeline), "adapter-only")
    assert trained.counts.keys() == {"adapter"}
    assert {name.split(".")[1] for name in trained.names} >= {"temporal_adapter", "mid_block"}
    optimizer = torch.optim.SGD(trained.parameters, lr=0.1)
    moved = []
    for _ in range(2):
        denoiser(noisy.requires_grad_(), times, condition).square().mean().backward()
        moved.append(
            {n for n, one in zip(trained.names, trained.parameters, strict=True) if one.grad.any()}
        )
        optimizer.step()
        optimizer.zero_grad()
    # The context has no weight at first, so nothing reaches what makes it.
    assert all(".fusion." in name for name in moved[0])
    assert moved[1] == set(trained.names)


def test_gradient_checkpointing_changes_no_bit_of_an_adapters_gradients() -> None:
    family = next(one for one in TRAINED if one.name == "SVD")
    denoiser = denoiser_for(adapted(family)).requires_grad_(False)
    shown = plain_condition(
        latents=torch.ones(1, 4, 2, 4, 4),
        prompt_embeds=torch.ones(1, 3, 8),
        image_embeds=torch.ones(1, 1, 8),
        more={"motion_and_noise": torch.ones(1, 2)},
    )
    trained = choose_parameters(denoiser, SVD)
    with torch.no_grad():
        for one in trained.parameters:
            one.add_(0.1 * torch.randn(one.shape, generator=torch.Generator().manual_seed(1)))
    gradients = []
    for prepare in (denoiser.eval, denoiser.unet.enable_gradient_checkpointing):
        prepare()
        noisy = torch.ones(1, 4, 2, 4, 4, requires_grad=True)
        denoiser(noisy, torch.tensor([0.5]), shown).square().mean().backward()
        gradients.append([one.grad for one in trained.parameters])
        for one in trained.parameters:
            one.grad = None
    assert all(map(torch.equal, *gradients))
