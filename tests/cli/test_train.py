"""`motionmerge train`: the runs of the pocket model, from the command line."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest
import yaml
from PIL import Image
from typer.testing import CliRunner

from motionmerge.cli import app
from motionmerge.cli.train import _progress_line, _validation_lines
from motionmerge.io.weights import open_weights
from motionmerge.models.pocket.components import weights_path
from motionmerge.training.config_file import shipped_configs
from motionmerge.training.pocket.video import VideoObjective
from motionmerge.training.settings import TrainingProgress

from ..tiny.clips import save_clips
from ..tiny.dynamicrafter import NUM_FRAMES
from ..tiny.folders import save_dynamicrafter


@pytest.fixture
def own_run(tmp_path: Path) -> Path:
    """A configuration of two steps, on a tiny DynamiCrafter and three clips."""
    save_dynamicrafter(tmp_path / "model")
    manifest = save_clips(tmp_path / "clips")
    content = {
        "model": str(tmp_path / "model"),
        "data": {
            "folder": str(manifest.parent),
            "manifest": str(manifest),
            "sizes": [[16, 16]],
            "num_frames": NUM_FRAMES,
            "frame_stride": [1, 2],
            "views": 2,
        },
        "settings": {"steps": 2, "batch_size": 2, "precision": "fp32", "log_every": 1},
        "validation": {"every": 2, "clips": 1, "video_steps": 1},
        "output": str(tmp_path / "run"),
    }
    path = tmp_path / "own.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def train(*arguments: str):
    return CliRunner().invoke(app, ["train", *arguments])


def test_a_dry_run_shows_the_settings_and_trains_nothing(tmp_path: Path):
    folder = tmp_path / "run"
    result = train(
        "pocket-base", "--dry-run", "--json", "--set", "settings.steps=7", "-o", str(folder)
    )
    assert json.loads(result.stdout)["settings"]["steps"] == 7
    assert "warning: the run has 7 steps, and `settings.warmup_steps` is 200" in result.stderr
    assert "it ends at 3.5% of the learning rate" in result.stderr
    assert not folder.exists()


def test_a_base_and_its_stage_one_are_trained_and_say_so_in_their_headers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    # Drawing the 1500 pictures of the pool takes longer than a step; 20 do here.
    monkeypatch.setitem(VideoObjective.__init__.__kwdefaults__, "num_canvases", 20)
    changes = ["settings.steps=1", "settings.batch_size=2", "settings.precision=fp32"]
    short = [word for change in changes for word in ("--set", change)]
    first = train("pocket-base", *short, "--json", "-o", str(tmp_path / "b"))
    assert first.exit_code == 0, first.output
    base = tmp_path / "b/base.safetensors"
    assert json.loads(first.stdout)["output"] == str(base)
    spatial = "unet.down_stages.0.resnet.conv1.weight"
    temporal = "unet.temporal_in.proj_in.weight"
    for verb, name, trains, changed, kept in (
        ("pocket-tuned", "tuned", "adapter and U-Net", [spatial, temporal], []),
        ("pocket-equal", "equal", "adapter and U-Net", [spatial, temporal], []),
        ("pocket-temporal", "temporal", "adapter and temporal blocks", [temporal], [spatial]),
        ("pocket-temporal-naive", "temporal-naive", "temporal blocks", [temporal], [spatial]),
    ):
        second = train(verb, *short, "-o", str(tmp_path / verb), "--set", f"base={base}")
        assert second.exit_code == 0, second.output
        tuned = tmp_path / verb / f"{name}.safetensors"
        with open_weights(base) as before, open_weights(tuned) as after:
            assert before.keys() == after.keys()
            card = json.loads(after.metadata["model_card"])
            projector = [n for n in before.keys() if n.startswith("image_projector.")]  # noqa: SIM118
            assert projector
            for tensor in (*projector, *kept):
                assert before.read(tensor).equal(after.read(tensor))
            assert all(not before.read(n).equal(after.read(n)) for n in changed)
        assert (card["run"], card["trains"]) == (name, trains)
        assert card["settings"]["steps"] == 1


def test_the_shipped_weights_say_what_made_them():
    for name in ("towers", "decoder", "base", "tuned", "naive", "equal"):
        path = weights_path(name)
        assert path.stat().st_size < 12e6
        with open_weights(path) as reader:
            card = json.loads(reader.metadata["model_card"])
        assert card["run"] == name
        assert card["licence"] == "Apache-2.0"
    assert sum(p.stat().st_size for p in path.parent.iterdir()) < 30e6


def test_every_shipped_configuration_has_a_line_in_the_help():
    shown = train("--help").stdout
    for name in shipped_configs():
        assert re.search(rf"^ {name}  +[A-Z].*\.\s*$", shown, re.MULTILINE), name


def test_the_pocket_model_is_trained_by_its_own_configurations_alone():
    words = ["model=pocket", "data.folder=clips", "data.manifest=clips.jsonl"]
    changes = [word for change in words for word in ("--set", change)]
    result = train("dynamicrafter-512-adapter", *changes, "--dry-run")
    assert result.exit_code == 2 and "Train `pocket-tuned`" in result.stderr


def test_a_configuration_that_is_not_there_is_refused_with_the_nearest_name():
    result = train("pocket-tune", "--dry-run")
    assert result.exit_code == 2
    assert "Write `pocket-tuned` instead of `pocket-tune`." in result.stderr


def test_what_a_shipped_configuration_lacks_is_named_with_the_flag_that_gives_it():
    result = train("dynamicrafter-512-adapter", "--set", "model=a", "--set", "data.folder=clips")
    assert result.exit_code == 2
    assert "has no `manifest`" in result.stderr
    assert "add --set data.manifest=VALUE" in result.stderr


@pytest.mark.parametrize("pair", ["settings.steps", "=3", "settings..steps=3"])
def test_a_change_that_is_none_is_refused(pair: str):
    result = train("pocket-base", "--dry-run", "--set", pair)
    assert result.exit_code == 2
    assert "KEY=VALUE" in result.stderr


def test_a_pattern_needs_no_quotes_of_yaml_and_a_file_of_others_is_kept(own_run: Path):
    result = train(str(own_run), "--dry-run", "--set", "trains=*.attn1.*", "--json")
    assert result.exit_code == 0 and json.loads(result.stdout)["trained"]
    (own_run.parent / "tuned.safetensors").touch()
    result = train("pocket-tuned", "-o", str(own_run.parent))
    assert result.exit_code == 2 and "tuned.safetensors is there, no run wrote" in result.stderr


def test_clips_become_a_tuned_folder_and_a_recipe_that_generate_uses(tmp_path: Path, own_run: Path):
    planned = train(str(own_run), "--dry-run", "--json")
    assert planned.exit_code == 0, planned.output
    plan = json.loads(planned.stdout)
    assert set(plan["trained"]) == {"adapter", "temporal"}
    assert (plan["views"], plan["steps"], plan["epochs"]) == (4, 2, 2)
    assert plan["memory"]["autoencoder of videos"] > 0
    trained = train(str(own_run))
    assert trained.exit_code == 0, trained.output
    again = train(str(own_run))
    assert f"going on from {tmp_path / 'run/state-00000002.pt'}" in again.stderr
    assert (
        "going on" not in trained.stderr
        and "step 2/2" in trained.stderr
        and "encoded 5 of 5 views" in trained.stderr
    )
    # Noise cannot be followed, so that its motion is not known.
    assert "step 2, 1 video: motion unknown beside the base's, first frame" in trained.stderr
    *_, chosen, command = trained.stdout.splitlines()
    assert chosen == "recipe: the motion of the base is not known"
    assert len(list((tmp_path / "run/strengths/videos").glob("*.mp4"))) == 1
    words = shlex.split(command)
    assert words[:2] == ["motionmerge", "generate"]
    Image.radial_gradient("L").resize((24, 20)).convert("RGB").save(tmp_path / "photo.jpg")
    words[2] = str(tmp_path / "photo.jpg")
    assert words[words.index("--num-frames") + 1] == str(NUM_FRAMES)
    made = CliRunner().invoke(app, [*words[1:], "--steps", "2", "-o", str(tmp_path / "out.mp4")])
    assert made.exit_code == 0, made.output
    assert (tmp_path / "out.mp4").stat().st_size > 0


def test_a_step_is_told_in_a_line_with_what_is_left(capsys):
    progress = TrainingProgress(
        step=50, steps=2000, loss=0.25, grad_norm=1.0, learning_rate=1e-4, seconds=200.0,
        step_seconds=4.0, seconds_left=7920.0,
    )  # fmt: skip
    _progress_line(4)(progress)
    line = re.sub(r"[\d.]+ GB", "GB", capsys.readouterr().err)
    assert line == "step 50/2000  loss 0.2500  1 samples/s  GB  3 min, 2.2 h left\n"


def test_a_validation_is_told_in_lines_and_warns_where_motion_is_lost(capsys):
    video = {"file": "a.mp4", "first_frame_psnr": 20.0}
    figures = {"held_out": {"0-0.25": 0.5}, "warn_below": 0.7, "videos": [video, video]}
    for motion in (0.8, 0.64):
        videos = [{**video, "relative_motion": motion + apart} for apart in (-0.1, 0.1)]
        _validation_lines(100, {**figures, "videos": videos, "relative_motion": motion})
    assert capsys.readouterr().err.splitlines() == [
        "step 100, held out: loss by noise 0-0.25 0.5000",
        "step 100, 2 videos: motion 80% of the base's (of 2: 70% to 90%), first frame 20.0 dB",
        "step 100, held out: loss by noise 0-0.25 0.5000",
        "step 100, 2 videos: motion 64% of the base's (of 2: 54% to 74%), first frame 20.0 dB",
        "warning: after step 100 videos move 64% as much as the base's, less than the 70% of "
        "validation.warn_below",
    ]
