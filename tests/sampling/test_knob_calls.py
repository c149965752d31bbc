"""Which pass of which run a denoiser's call is: told right, or refused by name."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch
from diffusers import FlowMatchHeunDiscreteScheduler, PyramidAttentionBroadcastConfig
from diffusers.models.attention_dispatch import attention_backend

from motionmerge.errors import ConfigError
from motionmerge.switching.denoiser_call import is_called_by
from motionmerge.switching.expert_bank import attached_bank, experts

from ..tiny.pipelines import generate
from .test_knobs_of_families import SCALES, built, make, named, recipe_of, seeded, told


@pytest.mark.parametrize("setting", ["guidance: 3", "image: low_pass(0.3)"])
def test_a_run_that_broke_off_between_passes_is_not_gone_on_with(setting: str) -> None:
    family = named("Wan 2.1")
    pipeline = built(family)
    contexts, model = iter(range(9)), pipeline.transformer
    with experts(pipeline, recipe_of(setting)):
        expected = make(pipeline, family)

        def context(name: str) -> Any:
            if next(contexts) == 1:  # before the second pass of the first step
                raise KeyboardInterrupt
            return type(model).cache_context(model, name)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(model, "cache_context", context)
            with pytest.raises(KeyboardInterrupt):
                make(pipeline, family)
        assert torch.equal(make(pipeline, family), expected)
        contexts = iter(range(9))
        with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(model, "cache_context", context)
            make(pipeline, family)


def test_a_call_is_the_second_pass_of_its_own_step_alone() -> None:
    """Either the step is another, or the sample is, or the pipeline does not guide."""
    pipeline = built(named("Wan 2.1"))
    sizes = pipeline.transformer.config
    samples = torch.randn(2, 1, sizes.in_channels, 2, 4, 4, generator=seeded(1))
    text = torch.randn(1, 4, sizes.text_dim, generator=seeded(2))

    class Bare(type(pipeline)):  # type: ignore[misc]  # a class that is only known here
        def __call__(self, scale: float, *calls: tuple[int, int]) -> torch.Tensor:
            self._guidance_scale = scale
            self.scheduler.set_timesteps(2)
            steps = self.scheduler.timesteps
            with torch.no_grad():
                made = [self.transformer(samples[i], steps[[t]], text)[0].clone() for i, t in calls]
            return torch.cat(made)

    Bare.__name__ = type(pipeline).__name__
    bare = Bare(**pipeline.components)
    with experts(bare, recipe_of("image: low_pass(0.3)")):
        first, other, last = (bare(1.0, call) for call in ((0, 0), (1, 0), (0, 1)))
        assert torch.equal(bare(5.0, (0, 0), (0, 1)), torch.cat([first, last]))
        assert torch.equal(bare(5.0, (0, 0), (1, 0)), torch.cat([first, other]))
        assert torch.equal(bare(1.0, (0, 0), (0, 0)), torch.cat([first, first]))
    assert not torch.equal(bare(1.0, (0, 0)), first)


def test_a_callback_that_guides_later_does_not_mix_two_videos() -> None:
    family = named("CogVideoX")
    pipeline = built(family)

    def guide(pipeline: Any, step: int, timestep: Any, tensors: Any) -> Any:
        pipeline._guidance_scale = 5.0
        return tensors

    told = {"guidance_scale": 1.0, "callback_on_step_end": guide, "batch": 2}
    late = recipe_of("step_fraction: 0.5, guidance: 1", "guidance: 3")
    with experts(pipeline, late), pytest.raises(ConfigError, match="no unconditional pass"):
        make(pipeline, family, **told)
    with experts(pipeline, recipe_of("image: low_pass(0.3)")):
        assert torch.equal(
            make(pipeline, family, **told), make(pipeline, family, batch=2, guidance_scale=1.0)
        )


@pytest.mark.parametrize("name", ["Wan 2.1", "CogVideoX"])
def test_a_pipeline_that_shares_the_denoiser_is_not_taken_for_the_one_with_knobs(name: str) -> None:
    family = named(name)
    pipeline = built(family)
    other = type(pipeline)(**pipeline.components)
    expected = told(other, family, 4.0)
    told(pipeline, family, 1.0)  # what it remembers is not true of the other
    for setting in ("guidance: 1", "image: low_pass(0.3)"):
        with experts(pipeline, recipe_of(setting)):
            with pytest.raises(ConfigError, match="called by something else than its"):
                told(other, family, 4.0)
            told(pipeline, family, 4.0)
            with pytest.raises(ConfigError, match="called by something else than its"):
                make(
                    pipeline,
                    family,
                    callback_on_step_end=lambda *_: {"latents": told(other, family, 4.0)},
                )
    assert torch.equal(told(other, family, 4.0), expected)


class Caller:
    """Is called as a pipeline is."""

    def __init__(self, denoiser: torch.nn.Module) -> None:
        self.denoiser = denoiser

    def __call__(self, *, keeps_locals: bool) -> dict[str, Any] | None:
        """Drop a tensor after the caller was looked for; return what is kept on purpose."""
        kept = locals() if keeps_locals else None
        dropped = torch.zeros(1)
        lives = weakref.ref(dropped)
        assert is_called_by(self, self.denoiser)
        del dropped
        assert keeps_locals or lives() is None
        return kept


def test_looking_for_the_caller_keeps_none_of_its_tensors_and_takes_nothing_away() -> None:
    caller = Caller(torch.nn.Identity())
    assert caller(keeps_locals=False) is None
    kept = caller(keeps_locals=True)
    assert kept is not None
    assert kept["self"] is caller


def test_a_model_that_is_compiled_meanwhile_is_named() -> None:
    pipeline = built(named("Wan 2.1"))
    recipe = recipe_of("guidance: 3")
    with pytest.raises(ConfigError, match="was compiled while"), experts(pipeline, recipe):
        pipeline.transformer.compile(backend="eager")
    assert attached_bank(pipeline.transformer) is None
    with experts(pipeline, recipe):  # compiled before
        pass


@pytest.mark.parametrize(
    "name", ["Wan 2.1", "Hunyuan"]
)  # Hunyuan's does not tell whether it guides
def test_guidance_that_has_no_second_pass_is_refused(name: str) -> None:
    family = named(name)
    pipeline = built(family)
    scale = {SCALES.get(name, "guidance_scale"): 1.0}
    for recipe in (recipe_of("guidance: 3"), recipe_of("step_fraction: 0.5, guidance: 3", "")):
        with experts(pipeline, recipe), pytest.raises(ConfigError, match="no unconditional pass"):
            make(pipeline, family, **scale)
    recipe, refused = recipe_of("guidance: 3"), pytest.raises(ConfigError, match="no unconditional")
    one_step = {"num_inference_steps": 1, **scale}  # nothing is called after it
    if name == "Wan 2.1":
        with experts(pipeline, recipe), refused:
            generate(pipeline, family, **one_step)
    else:
        with refused, experts(pipeline, recipe):
            generate(pipeline, family, **one_step)


@pytest.mark.parametrize(
    ("spoil", "setting", "match"),
    [
        (lambda p: p.transformer.fuse_qkv_projections(), "attention: first_frame(-1)", "unfused"),
        (
            lambda p: p.transformer.set_attention_backend("_native_flash"),
            "attention: first_frame(-1)",
            "takes no bias",
        ),
        (
            lambda p: p.transformer.blocks[0].compile(backend="eager"),
            "attention: first_frame(-1)",
            "is compiled",
        ),
    ],
)
def test_what_would_not_heed_a_bias_is_refused(spoil: Any, setting: str, match: str) -> None:
    pipeline = built(named("Wan 2.1"))
    with attention_backend("native"):  # it is chosen for all models at once
        spoil(pipeline)
        with pytest.raises(ConfigError, match=match):
            experts(pipeline, recipe_of(setting))


def test_caches_last_images_bare_denoisers_and_schedulers_of_two_calls_are_refused() -> None:
    family = named("Wan 2.1")
    pipeline = built(family)
    pipeline.scheduler, own = FlowMatchHeunDiscreteScheduler(), pipeline.scheduler
    recipe = recipe_of("guidance: 1")
    with experts(pipeline, recipe), pytest.raises(ConfigError, match="several times a step"):
        make(pipeline, family)
    pipeline.scheduler = own
    with pytest.raises(ConfigError, match="Pass the pipeline"):
        experts(pipeline.transformer, recipe_of("guidance: 1"), scheduler=pipeline.scheduler)
    with experts(pipeline, recipe_of("image: motion_amplitude(1.2)")):
        image = family.inputs(1)["image"]
        with pytest.raises(ConfigError, match="first image alone"):
            make(pipeline, family, last_image=image)
    pipeline.transformer.enable_cache(
        PyramidAttentionBroadcastConfig(
            spatial_attention_block_skip_range=2, current_timestep_callback=lambda: 500
        )
    )
    with experts(pipeline, recipe_of("guidance: 1")), pytest.raises(ConfigError, match="caches"):
        make(pipeline, family)
    pipeline.vae = None  # as a modular pipeline that only denoises has it
    with pytest.raises(ConfigError, match="has no VAE with latents_mean"):
        experts(pipeline, recipe_of("image: motion_amplitude(1.2)"))


def test_an_empty_schedule_adds_no_way_of_calling() -> None:
    pipeline = built(named("Wan 2.1"))
    with experts(pipeline, recipe_of("above: 0.5", "")):
        assert "_compiled_call_impl" not in vars(pipeline.transformer)
    with experts(pipeline, recipe_of("above: 0.5, guidance: 1", "")):
        assert "_compiled_call_impl" in vars(pipeline.transformer)
        assert not pipeline.transformer._forward_pre_hooks
    assert "_compiled_call_impl" not in vars(pipeline.transformer)
