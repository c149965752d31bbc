"""`motionmerge generate --model`: any family's folder, its experts, and what is refused."""

from __future__ import annotations

import json
import shutil
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from typer.testing import CliRunner

from motionmerge.cli import app
from motionmerge.cli.video_flags import VideoFlags
from motionmerge.io.video import read_video, read_video_metadata
from motionmerge.merging.recipes.recipe import Recipe
from motionmerge.sampling.request.experts import WeightedLora, from_base, from_loras, from_weights
from motionmerge.sampling.request.folder import find_pipeline
from motionmerge.sampling.request.loading import load_pipeline
from motionmerge.sampling.videos.make_video import make_video
from motionmerge.sampling.videos.settings import VideoSettings
from motionmerge.switching.expert_bank import experts

from ..tiny.folders import family_named, save_dynamicrafter, save_lora, save_tiny
from ..tiny.loras import with_motion, with_weights
from ..tiny.pipelines import other_weights, photo

LAYER = "proj_out"
SMALL = ["--steps", "2", "--height", "16", "--width", "16", "--num-frames", "5", "--dtype", "fp32"]


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tiny models, what one of them was tuned from, a LoRA and a photo."""
    folder = tmp_path_factory.mktemp("models")
    save_tiny("SVD", folder / "svd")
    save_tiny("Wan 2.2-A14B", folder / "wan22")
    save_dynamicrafter(folder / "dynamicrafter")
    mean = torch.rand(1, 4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    save_file({"Expectation_X0": mean, "Tr_Cov_d": torch.tensor(0.5)}, folder / "noise.safetensors")
    pipeline = save_tiny("Wan 2.1", folder / "wan")
    save_lora(folder / "lora.safetensors", pipeline.transformer, LAYER)
    base = other_weights(pipeline, family_named("Wan 2.1"), seed=1)
    save_file(base, folder / "base.safetensors")
    own = {name.removeprefix("transformer."): value for name, value in base.items()}
    save_file(own, folder / "bare.safetensors")
    photo(24).save(folder / "photo.png")
    return folder


def generate(workplace: Path, *options: str, model: str = "wan") -> Any:
    command = ["generate", str(workplace / "photo.png"), "--model", str(workplace / model)]
    return CliRunner().invoke(app, [*command, *SMALL, *options])


def plain(workplace: Path, output: Path) -> torch.Tensor:
    result = generate(workplace, "--prompt", "a cat", "-o", str(output))
    assert result.exit_code == 0, result.output
    return read_video(output)[0]


def test_several_prompts_and_seeds_become_videos_that_say_how_they_were_made(
    workplace: Path, tmp_path: Path
) -> None:
    (tmp_path / "prompts.txt").write_text("a cat jumps\n\nthe camera pans left\n")
    sheet = tmp_path / "sheet.png"
    options = ["--prompts", str(tmp_path / "prompts.txt"), "--num-videos", "2", "--seed", "4"]
    result = generate(
        workplace,
        *options,
        *("--negative-prompt", "a dog", "--guidance", "2", "--frame-rate", "12.5"),
        *("--lora", str(workplace / "lora.safetensors"), "--motion", "0.25"),
        *("-o", str(tmp_path / "v.mp4"), "--sheet", str(sheet), "--json"),
    )
    assert result.exit_code == 0, result.output
    rows = json.loads(result.stdout)
    names = [f"v-{number:02}-seed{seed}.mp4" for number in (1, 2) for seed in (4, 5)]
    assert [Path(row["output"]).name for row in rows] == names
    assert sorted(path.name for path in tmp_path.glob("*.mp4")) == sorted(names)
    videos = [read_video(tmp_path / name) for name in names]
    assert all(video.shape == (5, 3, 16, 16) and fps == 12.5 for video, fps in videos)
    assert not torch.equal(videos[0][0], videos[1][0])
    about = read_video_metadata(tmp_path / names[3])
    assert (about["prompt"], about["seed"]) == ("the camera pans left", 5)
    assert about["num_inference_steps"] == 2
    assert (about["negative_prompt"], about["guidance_scale"]) == ("a dog", 2)
    assert "lora_1" in about["recipe"]
    assert {"motionmerge", "torch", "diffusers"} <= about.keys()
    assert Image.open(sheet).height > 4 * 16


def test_a_model_without_prompts_needs_none(workplace: Path, tmp_path: Path) -> None:
    output = tmp_path / "svd.mp4"
    options = ["--height", "32", "--width", "32", "--frame-rate", "9", "-o", str(output)]
    result = generate(workplace, *options, model="svd")
    assert result.exit_code == 0, result.output
    video, fps = read_video(output)
    assert video.shape == (5, 3, 32, 32) and fps == 9


def choices(workplace: Path) -> dict[str, tuple[Any, Any]]:
    """What the flags choose, and the same written out for `experts`."""
    lora, wan = workplace / "lora.safetensors", workplace / "wan"
    base, bare = workplace / "base.safetensors", workplace / "bare.safetensors"
    return {
        "lora": (from_loras([WeightedLora(lora)]), with_weights(lora, {"all": 1.0})),
        "lora and motion": (
            from_loras([WeightedLora(lora, -0.5)], boundary=0.9),
            {**with_motion(lora, 0.5), "boundary": 0.9},
        ),
        "base and motion": (
            from_base(base, wan, motion=0.5, boundary=0.9),
            {"recipe": Recipe.knob(base=base, tuned=wan, motion=0.5), "boundary": 0.9},
        ),
        "bare base": (
            from_base(bare, wan, motion=0.5, boundary=0.9),
            {
                "recipe": Recipe.knob(base=bare, tuned=wan / "transformer", motion=0.5),
                "boundary": 0.9,
            },
        ),
        "weights": (from_weights(base), {"recipe": {"all": base}}),
    }


def test_loras_have_weights_of_their_own_or_are_turned_by_the_knob(workplace: Path) -> None:
    lora = workplace / "lora.safetensors"
    names = ("odd=1.safetensors", "wan2gp.safetensors", "plain.safetensors", "a=b,c.safetensors")
    others = [workplace / name for name in names]
    for other in others:
        shutil.copy(lora, other)
    flags = [f"{lora}=0.5", f"{others[0]}=-0.25,1", f"{others[1]}=2;0", *map(str, others[2:])]
    for motion, last in ((None, "1.0"), (2.0, "-2.0")):
        chosen = VideoFlags(model=str(workplace / "wan"), lora=flags, motion=motion)
        recipe = chosen.chosen_experts(chosen.request.open_model()).recipe
        assert recipe is not None
        noisy, details = (str(recipe.experts[name]) for name in ("dynamics", "consistency"))
        above, below = ("0.5", "-0.25", "2.0", last, last), ("0.5", "1.0", "0.0", "1.0", "1.0")
        for number, weights in enumerate(zip(above, below, strict=True), start=1):
            assert f"lora(lora_{number}, {weights[0]})" in noisy
            assert f"lora(lora_{number}, {weights[1]})" in details
        paths = [Path(recipe.inputs[f"lora_{n}"].path) for n in range(1, 6)]
        assert paths == [path.resolve() for path in (lora, *others)]


def test_what_the_flags_choose_equals_the_experts_written_out(workplace: Path) -> None:
    pipeline = load_pipeline(find_pipeline(workplace / "wan"))
    pipeline.set_progress_bar_config(disable=True)
    asked = VideoSettings(prompt="a cat", height=16, width=16, num_frames=5, num_inference_steps=4)
    own = make_video(pipeline, photo(24), asked)
    for name, (choice, written_out) in choices(workplace).items():
        with choice.attach(pipeline):
            chosen = make_video(pipeline, photo(24), asked)
        with experts(pipeline, **written_out):
            expected = make_video(pipeline, photo(24), asked)
        assert torch.equal(chosen, expected), name
        assert not torch.equal(chosen, own), name


def test_the_flags_reach_the_video(workplace: Path, tmp_path: Path) -> None:
    own = plain(workplace, tmp_path / "own.mp4")
    lora, base = str(workplace / "lora.safetensors"), str(workplace / "base.safetensors")
    several = {
        "recipe": ["--recipe", "lora-rescue", "--input", f"style={lora}", "--boundary", "0.95"],
        "motion": ["--motion", "0.5", "--base", base, "--boundary", "0.95"],
        "weights": ["--weights", base],
    }
    for name, options in several.items():
        output = tmp_path / f"{name}.mp4"
        result = generate(workplace, "--prompt", "a cat", "-o", str(output), *options)
        assert result.exit_code == 0, result.output
        assert not torch.equal(read_video(output)[0], own), name
        assert "experts:" in read_video_metadata(output)["recipe"]
    assert "recipe" not in read_video_metadata(tmp_path / "own.mp4")


def test_the_second_guidance_reaches_the_video(workplace: Path, tmp_path: Path) -> None:
    videos = []
    for name, more in (("one", []), ("two", ["--guidance-2", "500"])):
        output = tmp_path / f"{name}.mp4"
        options = ("--prompt", "a cat", "--guidance", "3.5", *more, "-o", str(output))
        result = generate(workplace, "--steps", "8", *options, model="wan22")
        assert result.exit_code == 0, result.output
        videos.append(read_video(output)[0])
    assert not torch.equal(*videos)
    about = read_video_metadata(output)
    assert (about["guidance_scale"], about["guidance_scale_2"]) == (3.5, 500)


def test_the_end_and_the_start_of_a_dynamicrafter_reach_the_video(
    workplace: Path, tmp_path: Path
) -> None:
    photo, other = workplace / "photo.png", tmp_path / "other.png"
    Image.new("RGB", (16, 16), "red").save(other)
    noise = workplace / "noise.safetensors"
    several: dict[str, tuple[list[str], dict[str, Any]]] = {
        "own": ([], {}),
        "loop": (["--loop"], {"last_image": str(photo)}),
        "end": (["--last-image", str(other)], {"last_image": str(other)}),
        "late": (["--start-step", "900"], {"start_step": 900}),
        "analytic": (
            ["--start-step", "900", "--analytic-init", str(noise)],
            {"start_step": 900, "analytic_init": str(noise)},
        ),
    }
    videos = []
    for name, (flags, said) in several.items():
        output = tmp_path / f"{name}.mp4"
        options = ["--prompt", "a cat", "--num-frames", "3", "-o", str(output), *flags]
        result = generate(workplace, *options, model="dynamicrafter")
        assert result.exit_code == 0, result.output
        videos.append(read_video(output)[0])
        about = read_video_metadata(output)
        own = ("last_image", "start_step", "analytic_init")
        assert {name: about[name] for name in own if name in about} == said
    assert not any(torch.equal(left, right) for left, right in combinations(videos, 2))
    looped = tmp_path / "looped.mp4"
    options = ["--prompt", "a cat", "--num-frames", "3", "--last-image", str(photo)]
    generate(workplace, *options, "-o", str(looped), model="dynamicrafter")
    assert torch.equal(read_video(looped)[0], videos[1])
    options = ["--prompt", "a cat", "--num-frames", "3", "--last-image", str(other)]
    over = generate(workplace, *options, "--sheet", str(other), model="dynamicrafter")
    assert over.exit_code == 2 and "is the last image already" in " ".join(over.output.split())


def test_a_video_says_which_dtype_its_model_had(workplace: Path, tmp_path: Path) -> None:
    for flag, dtype in (("fp32", "torch.float32"), ("bf16", "torch.bfloat16")):
        options = ("--prompt", "a cat", "--dtype", flag, "-o", str(tmp_path / "x.mp4"))
        plan = generate(workplace, *options, "--overwrite", "--dry-run", "--json")
        assert generate(workplace, *options, "--overwrite").exit_code == 0
        assert json.loads(plan.stdout)["dtype"] == dtype
        assert read_video_metadata(tmp_path / "x.mp4")["dtype"] == dtype


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--prompt", "x", "--guidance-2", "1"], "no second denoiser"),
        (["--prompt", "x", "--start-step", "940"], "begins with pure noise"),
        (["--prompt", "x", "--analytic-init", "n.pt"], "Say where to begin"),
        (["--prompt", "x", "--start-step", "940", "--analytic-init", "n.pt"], "n.pt"),
        (["--prompt", "x", "--loop"], "cannot end a video with an image"),
        (["--prompt", "x", "--last-image", "photo.png", "--loop"], "Choose one of them"),
        (["--prompt", "x", "--last-image", "nowhere.png"], "nowhere.png"),
        (["--prompt", "x", "--motion", "nan"], "--motion is nan, which is no number"),
        (["--prompt", "x", "--motion", "inf", "--lora", "l"], "--motion is inf"),
        (["--prompt", "x", "--motion", "0.5"], "Add --base"),
        (["--prompt", "x", "--base", "b"], "--base is for --motion"),
        (["--prompt", "x", "--input", "a=b"], "--input replaces"),
        (["--prompt", "x", "--lora", "l", "--recipe", "calm"], "--lora goes alone"),
        (["--prompt", "x", "--lora", "missing.safetensors"], "missing.safetensors"),
        (["--prompt", "x", "--lora", "own.safetensors=much"], "much"),
        (["--prompt", "x", "--recipe", "lora-rescue"], "--input style=FILE"),
        (["--prompt", "x", "--boundary", "0.5"], "needs experts"),
        (["--prompt", "x", "--size", "64"], "--size was given with"),
        (["--prompt", "x", "--num-frames", "6"], "Use 5 frames"),
        (["--prompt", "x", "--device", "toaster"], "no device"),
        (["--prompt", "x", "--prompts", "p"], "Choose one"),
        (["--prompts", "nowhere.txt"], "nowhere.txt"),
        ([], "needs a prompt"),
    ],
    ids=str,
)
def test_bad_options_are_named_before_the_model_is_loaded(
    workplace: Path, tmp_path: Path, options: list[str], message: str
) -> None:
    output = tmp_path / "out.mp4"
    result = generate(workplace, "-o", str(output), *options)
    assert result.exit_code == 2, result.output
    assert message in " ".join(result.output.split())
    assert "Fix:" in result.output
    assert "main memory" not in result.output
    assert not output.exists()


def test_flags_for_other_models_are_refused_for_the_pocket_model(
    workplace: Path, tmp_path: Path
) -> None:
    for flags in (["--dtype", "bf16"], ["--motion", "1", "--base", "b"]):
        command = ["generate", str(workplace / "photo.png"), "--prompt", "x", *flags]
        result = CliRunner().invoke(app, [*command, "-o", str(tmp_path / "out.mp4")])
        assert result.exit_code == 2
        assert "pocket model" in result.output


def test_a_dtype_of_no_video_model_is_refused_with_the_choices(
    workplace: Path, tmp_path: Path
) -> None:
    result = generate(workplace, "--prompt", "x", "--dtype", "int8", "-o", str(tmp_path / "x.mp4"))
    assert result.exit_code == 2
    assert "--dtype" in result.output and "bf16" in result.output
