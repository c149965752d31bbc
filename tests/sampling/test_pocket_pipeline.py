"""The pocket pipeline: the parent's with other encoders, experts included."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from motionmerge import Checkpoint, experts, load_pocket
from motionmerge.errors import CheckpointError, ConfigError, ShapeError
from motionmerge.merging.recipes.recipe import Recipe
from motionmerge.models.pocket.components import denoiser_weights, weights_path
from motionmerge.models.pocket.world import load_photo
from motionmerge.sampling.pipelines.inputs import prepare_image
from motionmerge.sampling.pipelines.pocket import PocketPipeline

PROMPT = "the camera pans left"


@pytest.fixture(scope="module")
def pipe() -> PocketPipeline:
    pipeline = load_pocket()
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def run(pipe: PocketPipeline, prompt: str = PROMPT, **options) -> torch.Tensor:
    settings = {"num_inference_steps": 3, "output_type": "pt", **options}
    generator = torch.Generator().manual_seed(0)
    return pipe(load_photo("coffee"), prompt, generator=generator, **settings).frames


def test_a_video_has_sixteen_frames_of_the_size_asked_for(pipe: PocketPipeline):
    assert run(pipe).shape == (1, 16, 3, 64, 64)
    assert run(pipe, height=128, width=128).shape == (1, 16, 3, 128, 128)


def test_the_video_begins_with_the_photo(pipe: PocketPipeline):
    video = run(pipe, num_inference_steps=8)[0]
    photo = prepare_image(
        load_photo("coffee"), height=64, width=64, default_size=(64, 64), multiple=64
    )
    assert (video[0] - (photo[0] / 2 + 0.5)).abs().mean() < 0.05


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGBA", "CMYK"])
def test_a_photo_of_any_mode_makes_the_video_of_its_colours(pipe: PocketPipeline, mode: str):
    image = load_photo("coffee").convert(mode)
    videos = [
        pipe(
            one,
            PROMPT,
            num_inference_steps=1,
            output_type="pt",
            generator=torch.Generator().manual_seed(0),
        ).frames
        for one in (image, image.convert("RGB"))
    ]
    assert torch.equal(*videos)


def test_the_prompt_decides_where_the_camera_goes(pipe: PocketPipeline):
    assert not torch.equal(run(pipe), run(pipe, "the camera pans right"))


def test_one_expert_everywhere_equals_the_plain_pipeline(pipe: PocketPipeline):
    plain = run(pipe)
    with experts(pipe, {"all": Checkpoint.load("pocket:base")}):
        assert torch.equal(run(pipe), plain)
    assert torch.equal(run(pipe), plain)


def test_the_knob_at_minus_one_with_the_boundary_at_zero_is_the_tuned_model(pipe: PocketPipeline):
    with experts(
        pipe, Recipe.knob(base="pocket:base", tuned="pocket:tuned", motion=-1.0), boundary=0.0
    ):
        turned = run(pipe)
    tuned = load_pocket("tuned")
    tuned.set_progress_bar_config(disable=True)
    assert torch.allclose(turned, run(tuned), atol=2e-2)


def test_sizes_and_frame_counts_it_cannot_make_are_refused(pipe: PocketPipeline):
    with pytest.raises(ShapeError, match="square"):
        run(pipe, height=64, width=128)
    with pytest.raises(ConfigError, match="clips of 16 frames"):
        run(pipe, num_frames=8)


def test_unknown_weights_are_refused_with_the_known_ones():
    with pytest.raises(CheckpointError, match="shipped are: base, decoder"):
        load_pocket("huge")


def test_a_folder_that_nothing_could_load_is_not_written(pipe: PocketPipeline, tmp_path: Path):
    with pytest.raises(ConfigError, match="denoiser_weights"):
        pipe.save_pretrained(tmp_path / "pocket")
    assert not list(tmp_path.iterdir())
    save_file(denoiser_weights(pipe), tmp_path / "own.safetensors")  # as the error says
    assert torch.equal(run(load_pocket(tmp_path / "own.safetensors")), run(pipe))


def test_towers_are_not_a_denoiser():
    with pytest.raises(CheckpointError, match="holds parts"):
        load_pocket(weights_path("towers"))
