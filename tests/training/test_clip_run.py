"""A training run from clips to a recipe, on a tiny DynamiCrafter."""

from __future__ import annotations

import json
import os
import pickle
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import motionmerge
from motionmerge.errors import CheckpointError, ConfigError
from motionmerge.io.video import read_frames
from motionmerge.merging.recipes.recipe import Recipe
from motionmerge.parameter_groups import group_of
from motionmerge.sampling.pipelines.dynamicrafter import DynamiCrafterPipeline
from motionmerge.training.clip_run import ClipRun
from motionmerge.training.held_out_videos import VideoFigures
from motionmerge.training.run_model import load_model

from ..tiny.clips import clip_run, losses_of, save_clips, weights_of
from ..tiny.dynamicrafter import NUM_FRAMES
from ..tiny.folders import save_dynamicrafter, save_tiny
from ..tiny.processes import as_two

VIDEOS = {"every": 2, "clips": 1, "video_steps": 1}
"""How the clip that is held out is animated."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    save_dynamicrafter(folder)
    return folder


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_clips(tmp_path_factory.mktemp("data") / "clips")


@pytest.fixture
def run_of(model: Path, manifest: Path, tmp_path: Path):
    def make(name: str = "run", **changes: Any) -> ClipRun:
        data = {
            "num_frames": NUM_FRAMES,
            "frame_stride": [1, 2],
            "views": 2,
            "condition_frames": 2,
        }
        return clip_run(
            changes.pop("model", model),
            manifest,
            tmp_path / name,
            data=data | changes.pop("data", {}),
            settings={"steps": 4, "save_every": 2} | changes.pop("settings", {}),
            **changes,
        )

    return make


def assert_same(ours: ClipRun, theirs: ClipRun) -> None:
    mine, other = (weights_of(run.config.output / "tuned/unet") for run in (ours, theirs))
    assert all(torch.equal(value, other[name]) for name, value in mine.items())


class Killed(Exception):
    pass


def test_kept_and_fresh_views_train_alike_bit_for_bit_and_so_does_a_run_that_was_killed(run_of):
    noise = {"objective": {"time_noise": {}, "drop": 0.2}}
    kept, fresh = run_of("kept", **noise), run_of("fresh", data={"cache": False}, **noise)
    losses = losses_of(kept)
    assert losses == losses_of(fresh) and len(set(losses)) == 4
    assert_same(kept, fresh)

    def dies(progress):
        if progress.step == 3:  # the newest state is that of step 2
            raise Killed

    killed = run_of("killed", **noise)
    with pytest.raises(Killed):
        killed.train(on_progress=dies)
    assert losses_of(killed) == losses[2:]
    assert_same(kept, killed)


def test_what_is_not_trained_is_that_of_the_base_and_motion_minus_one_is_what_was_trained(run_of):
    run = run_of()
    result, made = run.train()
    output = run.config.output
    assert made.weights == output / "tuned" and result.steps == 4
    base, tuned = weights_of(output / "base/unet"), weights_of(output / "tuned/unet")
    model = weights_of(Path(run.config.model) / "unet")
    assert all(torch.equal(base[name], value) for name, value in model.items())
    assert {group_of(name) for name in base.keys() - model.keys()} == {"adapter"}
    groups = {group_of(name) for name, value in tuned.items() if not value.equal(base[name])}
    assert groups == {"adapter", "temporal"}
    recipe = Recipe.load(made.recipe).with_parameters(motion=-1)
    experts = {name: str(one) for name, one in recipe.written_out().experts.items()}
    assert experts["consistency"] == "tuned"
    pipelines = [open_pipeline(path) for path in (output / "base", output / "tuned")]
    videos = []
    for pipeline, weights in zip(pipelines, (recipe, None), strict=True):
        with nullcontext() if weights is None else motionmerge.experts(pipeline, weights):
            videos.append(short_video(pipeline))
    torch.testing.assert_close(videos[0], videos[1], atol=1e-5, rtol=0)
    assert not torch.allclose(videos[0], short_video(open_pipeline(output / "base")), atol=1e-3)


def open_pipeline(folder: Path):
    pipeline = DynamiCrafterPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def short_video(pipeline) -> torch.Tensor:
    return pipeline(
        Image.radial_gradient("L").resize((16, 16)).convert("RGB"),
        "a cat",
        num_frames=NUM_FRAMES,
        num_inference_steps=2,
        generator=torch.Generator().manual_seed(0),
        output_type="latent",
    ).frames


def test_a_lora_is_trained_with_the_recipe_that_rescues_its_motion(run_of):
    run = run_of(trains="temporal", lora={"rank": 2})
    _, made = run.train()
    assert made.weights.name == "lora.safetensors" and made.model == run.config.model
    assert all(".lora_" in name for name in weights_of(made.weights))
    with motionmerge.experts(open_pipeline(Path(made.model)), made.recipe):
        pass
    assert not (run.config.output / "base").exists()


def test_a_sample_does_not_depend_on_its_batch_and_sizes_are_not_mixed(run_of):
    run = run_of(objective={"time_noise": {"tokens": "noised"}, "noise_range": {"above": 0.6}})
    model = load_model(run.folder, run.config, dtype=torch.float32)
    draw = pickle.loads(pickle.dumps(run.objective(model).draw))
    together, alone = draw(range(6)), [draw([index]) for index in range(6)]
    assert len(together) == 2 and sum(len(batch.latents) for batch in together) == 6
    for name in ("latents", "noise", "times", "prompt_embeds", "image_embeds", "condition_frame"):
        rows = [row for batch in together for row in getattr(batch, name)]
        assert {row.numpy().tobytes() for row in rows} == {
            getattr(one[0], name)[0].numpy().tobytes() for one in alone
        }, name
    times = torch.cat([batch.times for batch in together])
    assert bool((times > 500).all()) and len(set(times.tolist())) == 6


def test_fast_shots_are_shown_more_often_if_that_is_asked_for(run_of):
    plain, flat = run_of().views.order, run_of(data={"flatten_motion": 4}).views.order
    assert plain.weights is None and flat.weights is not None and len(flat.weights) == 3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": {"num_frames": 2}}, "2, a length that this dynamicrafter does not"),
        ({"data": {"sizes": [[10, 16]]}}, r"\[10, 16\], a size that this dynamicrafter"),
        ({"objective": {"noise_range": {"above": 0.9, "below": 0.2}}}, "No noise level"),
        ({"trains": "joint"}, "no parameter .* is of `joint`"),
        ({"data": {"frame_stride": None}}, "either `frame_stride` or `frame_rate`"),
        ({"data": {"frame_stride": [1, 10**12]}}, "`frame_stride` is"),
        ({"data": {"cache_folder": Path("/dev/null")}}, "Cannot write to the folder /dev/null"),
        ({"settings": {"accumulate": 3}}, "does not divide by 1 process with 3 accumulated"),
    ],
)
def test_what_does_not_go_with_the_model_is_refused_before_weights_are_read(
    run_of, changes, message
):
    with pytest.raises(ConfigError, match=message):
        run_of(**changes).count_parameters()


def test_what_no_run_wrote_is_not_replaced_by_a_result(run_of, model, manifest, tmp_path):
    own = tmp_path / "own"
    (own / "tuned").mkdir(parents=True)
    (own / "tuned/thesis.txt").touch()
    with pytest.raises(ConfigError, match="own/tuned is there, no run wrote it"):
        run_of("own")
    (own / "tuned").rename(own / "other")
    run = run_of("own")
    run.train()
    run_of("own")  # goes on
    (tmp_path / "link").symlink_to(own / "base")
    with pytest.raises(ConfigError, match="the run would replace with its result"):
        run_of("own", model=tmp_path / "link")
    with pytest.raises(ConfigError, match="among the clips"):
        run_of(manifest.parent)


def test_a_model_that_is_told_strides_is_not_given_rates(run_of, model, tmp_path):
    for part in model.iterdir():
        (tmp_path / part.name).symlink_to(part)
    scheduler = tmp_path / "scheduler"
    scheduler.unlink()
    scheduler.mkdir()
    config = json.loads((model / "scheduler/scheduler_config.json").read_text())
    config["prediction_type"] = "epsilon"
    (scheduler / "scheduler_config.json").write_text(json.dumps(config))
    run_of(model=tmp_path)
    with pytest.raises(ConfigError, match="told the stride of its frames"):
        run_of(model=tmp_path, data={"frame_stride": None, "frame_rate": 8})


def test_another_model_is_refused_and_other_clips_are_no_continuation(run_of, tmp_path):
    save_tiny("ChronoEdit", tmp_path / "other")
    with pytest.raises(ConfigError, match="a ChronoEditPipeline, whose training is unknown"):
        run_of(model=tmp_path / "other")
    run_of().train()
    with pytest.raises(CheckpointError, match="other settings or inputs: data"):
        run_of(data={"views": 3}).train()


def validated(run: ClipRun) -> list[dict[str, Any]]:
    text = (run.config.output / "validation.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


def test_not_all_clips_can_be_held_out(run_of):
    with pytest.raises(ConfigError, match="holds out 3 of 3 clips"):
        run_of(validation={"clips": 3})


def test_gradient_checkpointing_changes_no_bit(run_of):
    plain, less = run_of("plain"), run_of("less", settings={"gradient_checkpointing": True})
    assert losses_of(plain) == losses_of(less)
    assert_same(plain, less)


def figures_of(path: Path, photo: Path) -> VideoFigures:
    """A motion that differs from video to video, and is real."""
    frames, rate = read_frames(path)
    assert len(frames) == NUM_FRAMES and rate > 0 and photo.is_file()
    return VideoFigures(motion_degree=float(np.abs(np.diff(frames.astype(float), axis=0)).mean()))


def test_losses_and_videos_of_held_out_clips_change_nothing_and_outlive_a_kill(run_of):
    settings = {"ema_decay": 0.5, "precision": "bf16"}
    fewer = run_of("fewer", validation={"every": 4, "clips": 1, "videos": 0}, settings=settings)
    run = run_of("run", validation=VIDEOS, settings=settings)
    (held,) = run.held_out
    assert held.key not in [shot.key for shot in run.views.shots] and len(run.views.shots) == 2
    losses: dict[int, float] = {}
    seen: dict[int, float] = {}

    def progressed(progress):
        is_first = progress.step not in losses
        losses[progress.step] = progress.loss
        if progress.step == 3 and is_first:  # the newest state is that of step 2
            raise Killed

    def train():
        run.train(
            on_progress=progressed,
            on_validated=lambda step, figures: seen.update({step: figures["relative_motion"]}),
            measure_video=figures_of,
        )

    with pytest.raises(Killed):
        train()
    train()
    assert losses_of(fewer) == list(losses.values())
    assert_same(run, fewer)
    lines = validated(run)
    assert [line["step"] for line in lines] == list(seen) == [0, 2, 4]
    assert list(lines[0]["held_out"]) == ["0-0.25", "0.25-0.5", "0.5-0.75", "0.75-1"]
    assert lines[0]["held_out"] != lines[1]["held_out"] != lines[2]["held_out"]
    assert [(line["step"], line["held_out"]) for line in validated(fewer)] == [
        (line["step"], line["held_out"]) for line in (lines[0], lines[2])
    ]
    assert {line["step"]: line["relative_motion"] for line in lines} == seen
    assert seen[0] == 1.0 and seen[4] != 1.0  # the base was measured before the kill
    (file,) = {one["file"] for one in lines[2]["videos"]}
    assert file.startswith("videos/step-000004/1-") and (run.config.output / file).is_file()
    assert len(list(run.config.output.glob("videos/*/*.mp4"))) == 3


def test_a_base_whose_videos_had_other_steps_is_not_compared_with(run_of):
    run_of(validation=VIDEOS, settings={"steps": 2}).train(measure_video=figures_of)
    seen: dict[int, Any] = {}
    more = run_of(validation=VIDEOS | {"video_steps": 2}, settings={"steps": 4})
    more.train(
        on_validated=lambda step, figures: seen.update({step: figures["relative_motion"]}),
        measure_video=figures_of,
    )
    assert seen == {4: None}


def test_a_sharded_run_shows_its_videos_and_ends_as_that_of_one_process(run_of):
    settings = {"gradient_checkpointing": True, "steps": 2}
    alone = run_of("alone", validation=VIDEOS, settings=settings)
    both = run_of("both", validation=VIDEOS, settings=settings | {"shard": True})
    alone.train(measure_video=figures_of)

    def told(step: int, figures: Any) -> None:
        assert os.environ["RANK"] == "0" and "file" in figures["videos"][0]

    as_two(lambda: both.train(measure_video=figures_of, on_validated=told))
    ours, others = validated(alone), validated(both)
    assert [line["step"] for line in ours] == [line["step"] for line in others] == [0, 2]
    first, other = ours[0], others[0]
    assert first["held_out"] == pytest.approx(other["held_out"], rel=1e-4)
    assert first["videos"] == [
        {**one, "motion_degree": pytest.approx(one["motion_degree"], rel=1e-2)}
        for one in other["videos"]
    ]
    # Dropout differs from process to process.
    assert ours[1]["held_out"] == pytest.approx(others[1]["held_out"], rel=0.1)
    mine, theirs = (weights_of(run.config.output / "tuned/unet") for run in (alone, both))
    assert all(value.shape == theirs[name].shape for name, value in mine.items())


def test_a_video_that_cannot_be_made_ends_a_run_before_its_first_step_alone(run_of):
    def fails(path: Path, photo: Path) -> VideoFigures:
        if path.parent.name != "step-000000":
            raise ConfigError("No memory.", fix="Buy some.")
        return VideoFigures(failure="It is grey.")

    def fails_at_once(path: Path, photo: Path) -> VideoFigures:
        raise ConfigError("No memory.", fix="Buy some.")

    fresh = {"data": {"cache": False}, "settings": {"steps": 1}, "validation": VIDEOS}
    run = run_of(**fresh)
    run.train(measure_video=fails)
    lines = validated(run)
    assert [line["videos"][0]["failure"] for line in lines] == ["It is grey.", "No memory."]
    assert {line["relative_motion"] for line in lines} == {None}
    with pytest.raises(ConfigError, match="cannot be made: No memory"):
        run_of("other", **fresh).train(measure_video=fails_at_once)
