"""Knobs in pipelines of ours, in batches, and on the command line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from motionmerge.cli import app
from motionmerge.errors import ConfigError
from motionmerge.io.video import read_video, read_video_metadata
from motionmerge.merging.recipes.recipe import Recipe
from motionmerge.noise_levels import noise_level
from motionmerge.sampling.pipelines.dynamicrafter import DynamiCrafterPipeline
from motionmerge.sampling.videos.make_video import make_video
from motionmerge.sampling.videos.phases import make_videos
from motionmerge.sampling.videos.settings import VideoSettings
from motionmerge.switching.expert_bank import experts
from motionmerge.switching.image_functions import low_pass, time_noise

from ..tiny.folders import save_tiny
from ..tiny.pipelines import PROMPT
from .test_knobs_of_families import recipe_of

Generate = Callable[..., torch.Tensor]


@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_guidance_of_a_schedule_is_guidance_that_is_told(
    pipeline: DynamiCrafterPipeline, generate: Generate, scale: float
) -> None:
    told = generate(pipeline, guidance_scale=scale)
    with experts(pipeline, recipe_of(f"guidance: {scale}")):
        assert torch.equal(generate(pipeline), told)
    assert not torch.equal(generate(pipeline), told)


def test_guidance_needs_a_call_that_guides(
    pipeline: DynamiCrafterPipeline, generate: Generate
) -> None:
    recipe = recipe_of("guidance: 3")
    with pytest.raises(ConfigError, match="no unconditional"), experts(pipeline, recipe):
        generate(pipeline, guidance_scale=1.0)


def test_a_pipeline_of_ours_that_shares_the_denoiser_has_no_knobs(
    pipeline: DynamiCrafterPipeline, generate: Generate
) -> None:
    other = DynamiCrafterPipeline(**pipeline.components, height=16, width=16)
    other.set_progress_bar_config(disable=True)
    plain = generate(other)
    with experts(pipeline, recipe_of("above: 0.5", "")):
        assert torch.equal(generate(other), plain)
    for setting in ("guidance: 1", "start: 0.9"):
        with experts(pipeline, recipe_of(setting)), pytest.raises(ConfigError, match="else than"):
            generate(other)


class Watched:
    """Keeps the calls of a pipeline's U-Net, and what its scheduler gets of them."""

    def __init__(self, pipeline: DynamiCrafterPipeline) -> None:
        self.calls: list[tuple[torch.Tensor, torch.Tensor]] = []
        self.steps: list[torch.Tensor] = []
        pipeline.unet.register_forward_hook(self._keep)
        self._step = pipeline.scheduler.step
        pipeline.scheduler.step = self._keep_step

    def _keep(self, unet: Any, args: Any, output: Any) -> None:
        self.calls += zip(args[0].split(1), output[0].split(1), strict=True)

    def _keep_step(self, prediction: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        self.steps.append(prediction)
        return self._step(prediction, *args, **kwargs)


@pytest.mark.parametrize("at_once", [False, True])
def test_alg_is_three_passes_while_the_image_is_blurred(
    pipeline: DynamiCrafterPipeline, generate: Generate, at_once: bool
) -> None:
    pipeline.batches_guidance = at_once
    watched = Watched(pipeline)
    settings = {"guidance_scale": 5.0, "guidance_rescale": 0.0}
    with experts(pipeline, recipe_of("step_fraction: 0.25, image: low_pass(0.4)", "")):
        generate(pipeline, **settings)
    (sharp, u), (blurred, c), (again, both), *later = watched.calls
    assert len(later) == 6
    image = sharp[:, 4:]
    assert torch.equal(blurred[:, 4:], low_pass(image, 0.4))
    assert torch.equal(again, blurred)
    assert all(torch.equal(sample[:, 4:], image) for sample, _ in later)
    torch.testing.assert_close(watched.steps[0], u + 5 * (c - both), atol=2e-5, rtol=1e-5)
    torch.testing.assert_close(watched.steps[1], later[0][1] + 5 * (later[1][1] - later[0][1]))


def test_one_pass_is_enough_without_guidance_and_noise_is_for_both(
    pipeline: DynamiCrafterPipeline, generate: Generate
) -> None:
    watched = Watched(pipeline)
    recipe = recipe_of(
        "step_fraction: 0.25, image: low_pass(0.4)", "guidance: 4, image: time_noise(2)"
    )
    plain = pipeline.scheduler
    with experts(pipeline, recipe_of("image: low_pass(0.4), guidance: 1")):
        generate(pipeline)
    assert len(watched.calls) == 4
    watched.calls.clear()
    with experts(pipeline, recipe):
        generate(pipeline)
    first, second = watched.calls[3], watched.calls[4]
    image = watched.calls[0][0][:, 4:]
    level = noise_level(plain, plain.timesteps[1])
    noisy = time_noise(image, strength=2, power=5, level=level, seed=0)
    assert torch.equal(first[0][:, 4:], noisy)
    assert torch.equal(second[0][:, 4:], noisy)


def test_a_schedule_can_begin_late(pipeline: DynamiCrafterPipeline, generate: Generate) -> None:
    late = generate(pipeline, start_step=900)
    level = noise_level(pipeline.scheduler, 899)
    with experts(pipeline, recipe_of(f"start: {level + 1e-9}")):
        assert torch.equal(generate(pipeline), late)
        assert not torch.equal(generate(pipeline, start_step=800), late)
    early = recipe_of("start: 0.0001")
    with pytest.raises(ConfigError, match="the least of"), experts(pipeline, early):
        generate(pipeline)


def test_the_steps_of_a_late_start_are_announced(tmp_path: Path, photo: Any) -> None:
    recipe = recipe_of("above: 0.7, start: 0.8, guidance: 1", "guidance: 1, image: low_pass(0.5)")
    (tmp_path / "late.yaml").write_text(recipe.print())
    photo.save(tmp_path / "photo.png")
    command = ["generate", tmp_path / "photo.png", "--prompt", "the camera rests"]
    command += ["--steps", 4, "--dry-run"]
    late = run(*command, "--recipe", tmp_path / "late.yaml", "-o", tmp_path / "v.mp4")
    assert "1 of 4: model (guidance 1, start 0.8), 2-4" in late.output, late.output


def test_knobs_are_the_same_for_one_video_and_for_several(
    pipeline: DynamiCrafterPipeline, photo: Any
) -> None:
    own = pipeline.unet.state_dict()
    both = {
        name: {f"unet.{key}": value * factor for key, value in own.items()}
        for name, factor in (("a", 1.05), ("b", 0.95))
    }
    recipe = Recipe.parse(
        "inputs: {one: 'memory:one', two: 'memory:two'}\nexperts: {a: one, b: two}\nschedule:\n"
        "  - {expert: a, above: 0.95, start: 0.97, guidance: 4, image: low_pass(0.3)}\n"
        "  - {expert: a, above: 0.6}\n  - {expert: b, guidance: 1}\n"
    )
    wanted = [
        (photo, VideoSettings(prompt="a cat", num_frames=3, num_inference_steps=4, seed=seed))
        for seed in (1, 2)
    ]
    with experts(pipeline, recipe, inputs={"one": both["a"], "two": both["b"]}) as bank:
        alone = [make_video(pipeline, *one) for one in wanted]
        outcomes = {one.index: one for one in make_videos(pipeline, wanted, bank)}
    for index, video in enumerate(alone):
        assert outcomes[index].error is None
        assert torch.equal(outcomes[index].video, video)  # type: ignore[arg-type]


def test_knobs_act_on_each_prompt_and_each_of_its_videos(
    pipeline: DynamiCrafterPipeline, photo: Any
) -> None:
    recipe = recipe_of(
        "above: 0.9, start: 0.97, guidance: 4, image: low_pass(0.3)", "image: time_noise(2)"
    )

    def made(prompt: Any, *seeds: int, **options: Any) -> torch.Tensor:
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        size = {"num_frames": 3, "num_inference_steps": 3, "height": 16, "width": 16}
        options |= {"generator": generators, "output_type": "latent", **size}
        return pipeline(photo, prompt, **options).frames

    with experts(pipeline, recipe):
        together = made(["a cat", "up"], 1, 2, 3, 4, num_videos_per_prompt=2)
        for seed, prompt in ((2, "a cat"), (3, "up")):
            alone = made(prompt, seed)
            torch.testing.assert_close(together[seed - 1 : seed], alone, atol=1e-4, rtol=0)


SMALL = ["--steps", "4", "--height", "64", "--width", "64", "--num-frames", "5", "--dtype", "fp32"]


def run(*arguments: object) -> Any:
    return CliRunner().invoke(app, [*map(str, arguments)])


def test_shipped_knobs_make_videos_that_say_so(stored_wan: Path, tmp_path: Path) -> None:
    Image.radial_gradient("L").save(tmp_path / "photo.png")
    command = ["generate", tmp_path / "photo.png", "--model", stored_wan, *SMALL]
    command += ["--prompt", PROMPT, "--guidance", 1]
    videos = {}
    strong = {
        "plain": [],
        "alg": ["keep=0.1", "share=1"],
        "motion-amplitude": ["amplitude=5"],
        "first-frame-bias": ["bias=-9", "share=1"],
    }
    for name, values in strong.items():
        chosen = [] if name == "plain" else ["--recipe", name]
        chosen += [part for value in values for part in ("--set", value)]
        made = run(*command, *chosen, "-o", tmp_path / f"{name}.mp4")
        assert made.exit_code == 0, made.output
        videos[name] = read_video(tmp_path / f"{name}.mp4")[0]
        assert all(name == one or not torch.equal(videos[name], videos[one]) for one in videos), (
            name
        )
    about = read_video_metadata(tmp_path / "alg.mp4")
    assert "image: low_pass(keep)" in about["recipe"]
    sharp = run(*command, "--recipe", "alg", "--set", "keep=1", "-o", tmp_path / "sharp.mp4")
    assert sharp.exit_code == 0
    assert torch.equal(read_video(tmp_path / "sharp.mp4")[0], videos["plain"])
    planned = run(*command, "--recipe", "alg", "-o", tmp_path / "x.mp4", "--dry-run")
    assert "1 of 4: model (image low_pass(0.4)), 2-4: model" in planned.output
    guided = "inputs: {own: 'memory:base'}\nexperts: {own: own}\nschedule:\n"
    guided += "  - {expert: own, above: 1, guidance: 4}\n  - {expert: own}\n"
    (tmp_path / "guided.yaml").write_text(guided)
    plan = ["--recipe", tmp_path / "guided.yaml", "-o", tmp_path / "x.mp4", "--dry-run"]
    assert run(*command, *plan).exit_code == 0  # no step is above
    (tmp_path / "guided.yaml").write_text(guided.replace("above: 1", "above: 0.9"))
    made = run(*command, *plan)
    assert made.exit_code == 2 and "sets guidance 4" in made.output
    assert "Give --guidance above 1" in made.output
    assert run(*command, "--guidance", 2, *plan).exit_code == 0


def test_a_knob_that_a_model_lacks_is_refused_before_it_is_loaded(
    photo: Any, tmp_path: Path
) -> None:
    save_tiny("SVD", tmp_path / "svd")
    photo.save(tmp_path / "photo.png")
    command = ["generate", tmp_path / "photo.png", "--model", tmp_path / "svd"]
    for name in ("motion-amplitude", "first-frame-bias"):
        made = run(*command, "--recipe", name, "-o", tmp_path / "v.mp4", "--dry-run")
        assert made.exit_code == 2
        assert "which SVD does not have" in made.output
        assert "SkyReels-V2" in made.output


def test_show_prints_what_is_in_force() -> None:
    shown = json.loads(run("show", "alg", "--json").stdout)
    assert "image low_pass(keep)" in shown["schedule"]
