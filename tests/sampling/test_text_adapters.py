"""SVD and I2VGen-XL with a text-to-temporal adapter: at first without effect."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import CLIPTextModel

from motionmerge.errors import CheckpointError, ConfigError, ShapeError
from motionmerge.merging.recipes.recipe import Recipe
from motionmerge.models.dynamicrafter.encoders import text_encoder_config
from motionmerge.models.text_adapters import (
    I2VGenXLAdapterUNet,
    SvdAdapterUNet,
    add_text_adapter,
)
from motionmerge.parameter_groups import group_of
from motionmerge.sampling.pipelines.svd_adapter import SvdAdapterPipeline
from motionmerge.sampling.request.folder import find_pipeline
from motionmerge.sampling.request.loading import load_pipeline, show_progress
from motionmerge.switching.expert_bank import experts

from ..tiny import builders as build
from ..tiny.pipelines import FAMILIES, Family, generate, other_weights, tiny, weights_of
from .test_knobs_of_families import recipe_of

SVD, I2VGEN_XL = (
    replace(next(one for one in FAMILIES if one.name == name), steps=2)
    for name in ("SVD", "I2VGen-XL")
)
SHAPE = {"num_frames": 2, "num_heads": 2, "head_dim": 4}
TEXT_DIM = 8


def text_tower() -> CLIPTextModel:
    size = {"width": TEXT_DIM, "layers": 1, "heads": 2, "num_tokens": 16}
    return CLIPTextModel(text_encoder_config(**size, vocab_size=len(build.WORDS))).eval()


def adapted(family: Family) -> Any:
    """Make a tiny pipeline with a fresh adapter."""
    pipeline = tiny(family)
    add_text_adapter(pipeline.unet, text_dim=TEXT_DIM, **SHAPE)
    if family is I2VGEN_XL:
        pipeline.register_modules(unet=pipeline.unet)
        return pipeline
    with torch.random.fork_rng():
        torch.manual_seed(1)
        made = SvdAdapterPipeline.around(
            pipeline, text_encoder=text_tower(), tokenizer=build.tokenizer()
        )
    show_progress(made, is_quiet=True)
    return made


def told(prompt_seed: int, family: Family) -> dict[str, Any]:
    if family is SVD:
        return {"prompt": ["a cat jumps", "the camera pans left"][prompt_seed]}
    embeds = family.inputs(1)["prompt_embeds"]
    return {"prompt_embeds": embeds.flip(-1) if prompt_seed else embeds}


both = pytest.mark.parametrize("family", [SVD, I2VGEN_XL], ids=lambda family: family.name)


@both
def test_a_fresh_adapter_changes_no_bit_and_a_trained_one_reads_the_prompt(family: Family) -> None:
    plain, pipeline = generate(tiny(family), family), adapted(family)
    fresh = [generate(pipeline, family, **told(seed, family)) for seed in (0, 1)]
    if family is SVD:
        assert torch.equal(fresh[0], plain) and torch.equal(fresh[1], plain)
    else:  # its own layers read the prompt as well
        assert torch.equal(fresh[0], plain)
    with torch.no_grad():
        for name, one in pipeline.unet.named_parameters():
            if group_of(name) == "adapter":
                one.add_(0.2 * torch.randn(one.shape, generator=torch.Generator().manual_seed(2)))
    trained = [generate(pipeline, family, **told(seed, family)) for seed in (0, 1)]
    assert not torch.allclose(trained[0], fresh[0], atol=1e-3)
    assert not torch.allclose(trained[0], trained[1], atol=1e-3)


@both
@pytest.mark.parametrize("scale", [1.0, 5.0])
def test_guidance_of_a_schedule_keeps_the_prompt(family: Family, scale: float) -> None:
    pipeline = adapted(family)
    for name, one in pipeline.unet.named_parameters():
        if group_of(name) == "adapter":
            one.data += 0.2 * torch.randn(one.shape, generator=torch.Generator().manual_seed(2))
    argument = "max_guidance_scale" if family is SVD else "guidance_scale"
    expected = generate(pipeline, family, **told(1, family), **{argument: scale})
    with experts(pipeline, recipe_of(f"guidance: {scale}")):
        made = generate(pipeline, family, **told(1, family))
    torch.testing.assert_close(made, expected, atol=1e-3, rtol=1e-4)
    assert not torch.allclose(made, generate(pipeline, family, **told(1, family)), atol=1e-2)
    with experts(pipeline, recipe_of(f"guidance: {scale}, image: low_pass(0.3) + time_noise(0.1)")):
        turned = generate(pipeline, family, **told(1, family))
    assert not torch.allclose(turned, made, atol=1e-3)


@both
def test_a_pipeline_is_saved_and_loaded_with_its_adapter(family: Family, tmp_path: Any) -> None:
    pipeline = adapted(family)
    if family is I2VGEN_XL:
        pipeline.register_modules(text_encoder=text_tower(), tokenizer=build.tokenizer())
    with torch.no_grad():
        pipeline.unet.temporal_adapter.queries.mul_(2)
    pipeline.save_pretrained(tmp_path)
    folder = find_pipeline(tmp_path)
    assert folder.family.takes_text
    loaded = load_pipeline(folder)
    assert type(loaded.components["unet"]) in (SvdAdapterUNet, I2VGenXLAdapterUNet)
    assert type(loaded) is type(pipeline)
    ours, theirs = pipeline.unet.state_dict(), loaded.components["unet"].state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@both
def test_all_of_an_adapter_is_of_its_group(family: Family) -> None:
    before = set(tiny(family).unet.state_dict())
    added = adapted(family).unet.state_dict().keys() - before
    assert {group_of(f"unet.{name}") for name in added} == {"adapter"}
    assert not any(group_of(name) == "adapter" for name in before)
    assert (
        sum(".fusion.proj.weight" in name for name in added)
        == {"SVD": 4, "I2VGen-XL": 5}[family.name]
    )


@both
def test_each_expert_reads_the_prompt_by_its_own_adapter(family: Family) -> None:
    pipeline = adapted(family)
    one, other = weights_of(pipeline, family), other_weights(pipeline, family, seed=3)
    same = replace(family, steps=1)
    with experts(pipeline, {"one": one}):
        of_one = generate(pipeline, same)
    with experts(pipeline, {"other": other}):
        of_other = generate(pipeline, same)
    assert not torch.equal(of_one, of_other)
    # The only step is above the boundary: its expert is the first, after the second was in place.
    with experts(pipeline, {"dynamics": one, "consistency": other}, boundary=0.001) as bank:
        with bank.with_expert("consistency"):
            pass
        assert torch.equal(generate(pipeline, same), of_one)
    with experts(pipeline, {"dynamics": other, "consistency": one}, boundary=0.001):
        assert torch.equal(generate(pipeline, same), of_other)


@both
def test_experts_with_an_adapter_for_a_model_without_say_how_to_add_it(family: Family) -> None:
    base, tuned = tiny(family), weights_of(adapted(family), family)
    with pytest.raises(CheckpointError, match=r"add_text_adapter\(unet, \.\.\.\)"):
        experts(base, {"one": tuned})
    recipe = Recipe.parse(
        "inputs: {base: 'memory:base', tuned: 'memory:tuned'}\n"
        "experts: {one: 'tuned + 0.5 * (tuned - base)'}\n"
    )
    with pytest.raises(CheckpointError, match=r"add_text_adapter\(unet, \.\.\.\).*and save"):
        experts(base, recipe, inputs={"base": weights_of(base, family), "tuned": tuned})


def test_svd_without_a_prompt_or_with_too_many_is_refused() -> None:
    pipeline = adapted(SVD)
    with pytest.raises(ConfigError, match="no prompt for it"):
        generate(tiny_around(pipeline), SVD)
    with pytest.raises(ConfigError, match="2 texts in `prompt`, and 1 images"):
        generate(pipeline, SVD, prompt=["a cat", "a dog"])
    assert pipeline.unet.text_tokens is None
    pipeline.unet.text_tokens = torch.zeros(3, 16, TEXT_DIM)
    with pytest.raises(ShapeError, match="3 prompts, and 2 videos"):
        generate(tiny_around(pipeline), SVD)


def tiny_around(pipeline: Any) -> Any:
    """Make a plain pipeline of diffusers that has the U-Net with the adapter."""
    plain = tiny(SVD)
    plain.unet = pipeline.unet
    return plain


def test_an_adapter_is_added_once_and_to_networks_that_have_room_for_it() -> None:
    pipeline = adapted(SVD)
    with pytest.raises(ConfigError, match="SvdAdapterUNet"):
        add_text_adapter(pipeline.unet, text_dim=TEXT_DIM)
    with pytest.raises(ConfigError, match="Linear"):
        add_text_adapter(torch.nn.Linear(1, 1), text_dim=TEXT_DIM)
    with pytest.raises(CheckpointError, match="no `text_adapter`"):
        SvdAdapterUNet.from_config(dict(tiny(SVD).unet.config))
