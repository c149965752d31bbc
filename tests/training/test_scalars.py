"""The scalars of a run: silent without TensorBoard, its numbers with it; wandb where asked for."""

from __future__ import annotations

from importlib.util import find_spec

import pytest

from motionmerge.errors import ConfigError
from motionmerge.training import scalars
from motionmerge.training.scalars import scalars_of
from motionmerge.training.settings import TrainingProgress


def progress_at(step: int, *, loss: float) -> TrainingProgress:
    return TrainingProgress(
        step=step, steps=9, loss=loss, grad_norm=1.0, learning_rate=1e-3, seconds=1.0,
        step_seconds=1.0, seconds_left=1.0,
    )  # fmt: skip


def test_without_tensorboard_there_are_none_and_no_file(tmp_path, monkeypatch):
    monkeypatch.setattr(scalars, "find_spec", lambda name: None)
    with scalars_of(tmp_path) as found:
        assert found is None
    assert not list(tmp_path.iterdir())


def test_tensorboard_shows_log_and_validation_without_what_is_done_again(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    figures = {
        "held_out": {"0-0.25": 0.5},
        "relative_motion": 0.75,
        "videos": [{"motion_degree": 3.0, "first_frame_psnr": None}],
    }
    for first, last, loss in ((1, 5, 1.0), (3, 6, 2.0)):  # killed after 5, and on from 2
        with scalars_of(tmp_path) as found:
            for step in range(first, last + 1):
                found.add_progress(progress_at(step, loss=loss))
            found.add_validation(last, figures)
    seen = EventAccumulator(str(tmp_path / "tensorboard"))
    seen.Reload()
    losses = [(one.step, one.value) for one in seen.Scalars("train/loss")]
    assert losses == [(1, 1), (2, 1), (3, 2), (4, 2), (5, 2), (6, 2)]
    assert [(one.step, one.value) for one in seen.Scalars("videos/relative_motion")] == [(6, 0.75)]
    assert "videos/motion_degree" in seen.Tags()["scalars"]
    assert "videos/first_frame_psnr" not in seen.Tags()["scalars"]


def test_wandb_is_named_where_it_is_asked_for_and_absent(tmp_path, monkeypatch):
    monkeypatch.setattr(scalars, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="needs wandb"), scalars_of(tmp_path, wandb_project="p"):
        pass
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(find_spec("wandb") is None, reason="wandb is not installed")
def test_wandb_keeps_the_same_numbers(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    with scalars_of(tmp_path, wandb_project="p") as found:
        found.add_progress(progress_at(1, loss=0.5))
        found.add_validation(1, {"relative_motion": 0.75})
        run = found._wandb
        assert (run.summary["train/loss"], run.summary["videos/relative_motion"]) == (0.5, 0.75)
    assert list((tmp_path / "wandb").glob("offline-run-*/*.wandb"))
