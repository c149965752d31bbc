"""Knobs compute what their formulas say, on tiny models of every family that has them."""

from __future__ import annotations

import inspect
import math
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from motionmerge.merging.recipes.recipe import Recipe
from motionmerge.noise_levels import noise_level
from motionmerge.switching.expert_bank import experts
from motionmerge.switching.image_functions import low_pass, time_noise
from motionmerge.switching.knob_families import ATTENTION, FILTERS, GUIDANCE, KnobFamily

from ..tiny.pipelines import EVERY_FAMILY, Family, generate
from .test_knobs_of_families import (
    SETTINGS,
    built,
    known_of,
    make,
    named,
    recipe_of,
    seeded,
    told,
)


def official_alg(pipeline: Any, family: Family, *, keep: float, until: float, g: float) -> Any:
    """Denoise by three explicit passes while x <= until, and by two afterwards, as ALG's code does.

    All that the pipeline encodes is taken from a plain run of it.
    """
    seen: list[dict[str, Any]] = []
    hook = pipeline.transformer.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs), with_kwargs=True
    )
    generate(pipeline, family, guidance_scale=g)
    hook.remove()
    is_batched = family.name == "CogVideoX"
    axis = 2 if is_batched else 1
    first = dict(seen[0])
    sample = first.pop("hidden_states")[:1]
    width = pipeline.transformer.config.out_channels
    latents, beside = sample.split([width, sample.shape[axis] - width], dim=axis)
    texts = [kwargs["encoder_hidden_states"] for kwargs in seen[:2]]
    c, u = reversed(texts[0].split(1)) if is_batched else texts
    pipeline.scheduler.set_timesteps(family.steps)
    steps = pipeline.scheduler.timesteps

    def predict(image: torch.Tensor, text: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        inputs = torch.cat([latents, image], dim=axis)
        own = {"hidden_states": inputs, "timestep": t.expand(1), "encoder_hidden_states": text}
        with torch.no_grad():
            return pipeline.transformer(**{**first, **own})[0]

    for i, t in enumerate(steps):
        low = low_pass(beside, keep) if i / (len(steps) - 1) <= until else beside
        unconditional = predict(beside, u, t)
        prediction = unconditional + g * (predict(low, c, t) - predict(low, u, t))
        latents = pipeline.scheduler.step(prediction, t, latents, return_dict=False)[0]
    return latents


@pytest.mark.parametrize("name", ["Wan 2.1", "CogVideoX"])
def test_alg_is_three_explicit_passes(name: str) -> None:
    family = named(name)
    pipeline = built(family)
    expected = official_alg(pipeline, family, keep=0.4, until=0.4, g=5.0)
    with experts(pipeline, Recipe.load("alg").with_parameters(share=0.4)):
        made = generate(pipeline, family, guidance_scale=5.0)
    torch.testing.assert_close(made, expected, atol=2e-6, rtol=2e-6)
    assert not torch.allclose(made, generate(pipeline, family, guidance_scale=5.0), atol=1e-4)
    g = "guidance: 5, " + SETTINGS[FILTERS].replace("0.3", "0.4")
    with experts(pipeline, recipe_of(f"step_fraction: 0.4, {g}", "guidance: 5")):
        combined = generate(pipeline, family, guidance_scale=2.0)
    torch.testing.assert_close(combined, expected, atol=2e-6, rtol=2e-6)


def first_sample(pipeline: Any, family: Family) -> torch.Tensor:
    """Make a video; return what the denoiser was called with first."""
    seen: list[torch.Tensor] = []
    hook = pipeline.transformer.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(args[0] if args else kwargs["hidden_states"]),
        with_kwargs=True,
    )
    make(pipeline, family)
    hook.remove()
    return seen[0]


@pytest.mark.parametrize("name", ["Wan 2.1", "SkyReels-V2", "Wan 2.1 modular"])
def test_motion_amplitude_is_its_formula_in_the_units_of_the_vae(name: str) -> None:
    family = named(name)
    pipeline = built(family)
    plain = first_sample(pipeline, family)
    with experts(pipeline, recipe_of("image: motion_amplitude(1.5)")):
        turned = first_sample(pipeline, family)
    config, width = pipeline.vae.config, pipeline.transformer.config.out_channels
    mean, std = (
        torch.tensor(values).reshape(1, -1, 1, 1, 1)
        for values in (config.latents_mean, config.latents_std)
    )
    z = plain[:, -width:] * std + mean
    change = z - z[:, :, :1]
    level = change.mean(dim=(1, 3, 4), keepdim=True)
    pushed = (z[:, :, :1] + 1.5 * (change - level) + level).clamp(-6, 6)
    expected = plain.clone()
    expected[:, -width:, 1:] = ((pushed - mean) / std)[:, :, 1:]
    torch.testing.assert_close(turned, expected, atol=1e-5, rtol=1e-5)
    assert torch.equal(turned[:, :-width], plain[:, :-width])
    assert not torch.allclose(turned, plain, atol=1e-3)


@pytest.mark.parametrize("name", ["Wan 2.1", "CogVideoX"])
def test_noise_is_for_all_passes_and_a_filter_for_the_conditional_and_the_third(name: str) -> None:
    family = named(name)
    pipeline = built(family)
    place = known_of(pipeline).image
    assert place is not None
    images: list[torch.Tensor] = []
    pipeline.transformer.register_forward_pre_hook(
        lambda module, args, kwargs: images.extend(place.read(kwargs).split(1)), with_kwargs=True
    )
    generate(pipeline, family, num_inference_steps=3)
    image = images[0]
    images.clear()
    fading = "low_pass(0.3, strength=linear(1, 0, 1))"
    with experts(pipeline, recipe_of(f"guidance: 3, image: '{fading} + time_noise(0.5)'")):
        generate(pipeline, family, num_inference_steps=3)
    assert len(images) == 3 + 3 + 2
    levels = [noise_level(pipeline.scheduler, t) for t in pipeline.scheduler.timesteps]
    noisy = [time_noise(image, strength=0.5, power=5, level=one, seed=0) for one in levels]
    u, c = (1, 0) if name == "Wan 2.1" else (0, 1)
    for step, keep in enumerate([0.3, 0.65]):
        passes = images[3 * step : 3 * step + 3]
        assert torch.equal(passes[u], noisy[step])
        assert torch.equal(passes[c], low_pass(noisy[step], keep))
        assert torch.equal(passes[2], passes[c])
    assert torch.equal(images[6], noisy[2])
    assert torch.equal(images[7], noisy[2])


class Biased:
    """Attention that adds a number to the scores of the first frame, where a family has that.

    It stands in for torch's, and computes the softmax by its definition.

    Attributes:
        bias: The number.
        num_calls: How often it was added.
    """

    def __init__(self, pipeline: Any, family: Family, known: KnobFamily, *, bias: float) -> None:
        assert known.attention is not None
        self._has_third_pass = known.has(FILTERS)
        self.bias, self.num_calls, self._known = bias, 0, known
        self._plain = F.scaled_dot_product_attention
        self._is_self, self._number, self._tokens, self._texts = False, -1, 0, 0
        for denoiser in (getattr(pipeline, name) for name in family.denoisers):
            denoiser.register_forward_pre_hook(self._begin, with_kwargs=True)
            for blocks in known.attention.blocks:
                for block in getattr(denoiser, blocks):
                    attention = getattr(block, known.attention.module)
                    attention.register_forward_pre_hook(self._enter, with_kwargs=True)
                    attention.register_forward_hook(self._leave)

    def _begin(self, module: nn.Module, args: Any, given: dict[str, Any]) -> None:
        self._number += 1
        sample = args[0] if args else given["hidden_states"]
        frames = sample.shape[1 if self._known.name == "CogVideoX" else 2]
        self._frames = given["num_frames"] if sample.ndim == 3 else frames

    def _enter(self, module: nn.Module, args: Any, given: dict[str, Any]) -> None:
        hidden, text = [*args, *given.values()][:2]
        self._tokens = hidden.shape[1]
        self._texts = 0 if text is None else text.shape[1]
        self._is_self = True

    def _leave(self, *_: Any) -> None:
        self._is_self = False

    def __call__(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **options: Any
    ) -> torch.Tensor:
        if not self._is_self or query.shape != key.shape:  # LTX-2 has sound in the same block
            return self._plain(query, key, value, **options)
        assert self._known.attention is not None
        assert query.shape[-2] == self._tokens + self._texts
        scores = query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5
        mask = options["attn_mask"]
        if mask is not None:
            scores = scores.masked_fill(~mask, -math.inf)
        before = self._texts if self._known.attention.is_text_first else 0
        first = slice(before, before + self._tokens // self._frames)
        if self._known.passes == "separate":
            is_conditional = self._number % (3 if self._has_third_pass else 2) == 0
            rows = slice(None) if is_conditional else slice(0)
        elif self._has_third_pass and self._number % 2 == 1:
            rows = slice(0)
        else:
            rows = slice(len(scores) // 2, None)
        scores[rows, ..., first] += self.bias
        self.num_calls += 1
        return scores.softmax(-1) @ value


@pytest.mark.parametrize("family", EVERY_FAMILY, ids=lambda family: family.name)
def test_what_a_family_computes_is_the_formula(
    family: Family, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline = built(family)
    known = known_of(pipeline)
    if known.passes != "own" and known.has(FILTERS) and known.has(GUIDANCE):
        low = SETTINGS[FILTERS]
        with experts(pipeline, recipe_of(f"guidance: 3, {low}")):
            ours = make(pipeline, family)
        with experts(pipeline, recipe_of(low)):  # the pipeline combines
            assert torch.equal(told(pipeline, family, 3.0), ours)
    if known.has(ATTENTION):
        low = SETTINGS[FILTERS] if known.has(FILTERS) else ""
        both = ", ".join(filter(None, [low, "attention: first_frame(-1.5)"]))
        with experts(pipeline, recipe_of(both)):
            ours = make(pipeline, family)
        with experts(pipeline, recipe_of(low)):
            assert not torch.allclose(make(pipeline, family), ours, atol=1e-3)
            biased = Biased(pipeline, family, known, bias=-1.5)
            monkeypatch.setattr(F, "scaled_dot_product_attention", biased)
            torch.testing.assert_close(make(pipeline, family), ours, atol=1e-5, rtol=1e-5)
        assert biased.num_calls


@pytest.mark.parametrize("name", ["Wan 2.1", "CogVideoX", "LTX", "LTX-2", "Hunyuan"])
def test_a_large_bias_hides_the_first_frame_from_all_others(name: str) -> None:
    family = named(name)
    pipeline = built(family)
    place, denoiser = known_of(pipeline).attention, pipeline.transformer
    assert place is not None
    attention = getattr(getattr(denoiser, place.blocks[0])[0], place.module)
    seen: dict[nn.Module, dict[str, Any]] = {}

    def keep(module: nn.Module, args: tuple[Any, ...], given: dict[str, Any]) -> None:
        names = [*inspect.signature(type(module).forward).parameters][1:]
        seen[module] = {**dict(zip(names, args, strict=False)), **given}

    for module in (denoiser, attention):
        module.register_forward_pre_hook(keep, with_kwargs=True)
    make(pipeline, family)
    call, given = (dict(seen[module]) for module in (denoiser, attention))
    sample, hidden = call["hidden_states"], given["hidden_states"]
    frames = (
        sample.shape[1 if name == "CogVideoX" else 2] if sample.ndim > 3 else call["num_frames"]
    )
    first = hidden.shape[1] // frames
    moved = hidden.clone()
    moved[:, :first] += torch.randn(moved[:, :first].shape, generator=seeded(1))

    def others(tokens: torch.Tensor, bias: float) -> torch.Tensor:
        with torch.no_grad(), place.biased(denoiser, bias, call, rows=slice(None)):
            made = attention(**{**given, "hidden_states": tokens})
        return (made[0] if isinstance(made, tuple) else made)[:, first:]

    assert not torch.allclose(others(moved, 0.0), others(hidden, 0.0), atol=1e-4)
    torch.testing.assert_close(others(moved, -1e4), others(hidden, -1e4), atol=1e-6, rtol=0)
