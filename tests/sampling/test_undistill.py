"""The recipes `undistill` go away from the distilled weights, then end with them."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from diffusers.pipelines.ltx2.utils import DISTILLED_SIGMA_VALUES
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from motionmerge.cli import app
from motionmerge.merging.merge import realise
from motionmerge.merging.recipes.recipe import Recipe
from motionmerge.schedule import ExpertSchedule
from motionmerge.switching.denoising_steps import describe_steps
from motionmerge.switching.expert_bank import experts

from ..switching.test_lora_bank import ALPHA, RANK, lora_for
from ..tiny.folders import family_named, save_tiny
from ..tiny.pipelines import photo, tiny

GENERATOR = torch.Generator().manual_seed(0)


def schedule_of(name: str) -> ExpertSchedule:
    schedule = Recipe.load(name).schedule
    assert schedule is not None
    return schedule


def line(name: str, levels: list[float]) -> str:
    """Write the steps of a recipe whose conditions are noise levels alone."""
    schedule = schedule_of(name)
    used = [schedule.expert_at(noise_level=x, timestep=0, step_fraction=0) for x in levels]
    return describe_steps(used)


def test_undistill_goes_beyond_the_full_weights_and_ends_with_the_distilled_ones() -> None:
    full = {"layer.weight": torch.randn(8, 8, generator=GENERATOR)}
    distilled = {"layer.weight": torch.randn(8, 8, generator=GENERATOR)}
    made = realise(Recipe.load("undistill"), inputs={"full": full, "distilled": distilled})
    first, last = (made[name]["layer.weight"] for name in schedule_of("undistill").experts)
    expected = full["layer.weight"] + 0.25 * (full["layer.weight"] - distilled["layer.weight"])
    torch.testing.assert_close(first, expected)
    assert torch.equal(last, distilled["layer.weight"])


def test_undistill_with_a_lora_has_it_reversed_and_then_whole() -> None:
    family = family_named("Wan 2.1")
    pipeline = tiny(family)
    lora = lora_for(pipeline, family)
    with experts(pipeline, recipe="undistill-lora", inputs={"turbo": lora}) as bank:
        strengths = {}
        for name in bank.experts:
            with bank.with_expert(name):
                layer = next(m for m in pipeline.transformer.modules() if hasattr(m, "scaling"))
                strengths[name] = next(iter(layer.scaling.values()))
    unit = ALPHA / RANK
    assert strengths == {"undistilled": -0.25 * unit, "distilled_details": unit}


def test_undistill_has_steps_on_the_distilled_schedules_that_are_published() -> None:
    for name in ("undistill", "undistill-lora"):
        wan = [1.0, 0.9375, 0.8333, 0.625]  # of LightX2V's four steps, shift 5
        parts = line(name, wan), line(name, DISTILLED_SIGMA_VALUES)
        assert parts[0] == "steps 1-2 of 4: undistilled, 3-4: distilled_details"
        assert parts[1] == "steps 1-6 of 8: undistilled, 7-8: distilled_details"


def test_a_pipeline_folder_with_both_transformers_runs_from_the_command_line(
    tmp_path: Path,
) -> None:
    folder = tmp_path / "model"
    save_tiny("Wan 2.1", folder)
    full = folder.parent / "transformer_full"
    shutil.copytree(folder / "transformer", full)
    (file,) = full.glob("*.safetensors")
    save_file({name: tensor + 0.1 for name, tensor in load_file(file).items()}, file)
    photo(32).save(tmp_path / "photo.png")
    common = ["--model", str(folder), "--prompt", "a cat", "--steps", "4", "--device", "cpu"]
    common += ["--height", "16", "--width", "16", "--num-frames", "9"]
    made = {}
    for recipe in ("plain", "undistill"):
        output = tmp_path / f"{recipe}.mp4"
        command = ["generate", str(tmp_path / "photo.png"), "-o", str(output), *common]
        if recipe == "undistill":
            command += ["--recipe", "undistill", "--input", f"full={full}"]
            command += ["--input", f"distilled={folder / 'transformer'}"]
        result = CliRunner().invoke(app, command)
        assert result.exit_code == 0, result.output
        assert ("undistilled" in result.output) == (recipe == "undistill")
        made[recipe] = output.read_bytes()
    assert made["plain"] != made["undistill"]
