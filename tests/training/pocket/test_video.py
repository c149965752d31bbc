"""The pocket model's objective: what a sample is, and what each run trains."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

import pytest
import torch

from motionmerge.models.pocket.components import build_pocket_model, load_towers
from motionmerge.parameter_groups import group_of
from motionmerge.training.pocket.video import (
    ClipData,
    Denoiser,
    Trains,
    VideoObjective,
    fine_tune,
    trained_parameters,
)
from motionmerge.training.settings import TrainerSettings

BASE_DATA = ClipData(slow_power=1.0, missing_captions=0.2, wrong_captions=0.4)
TUNED_DATA = ClipData(slow_power=4.0, missing_captions=0.05, wrong_captions=0.0)


def test_a_sample_depends_on_its_index_alone():
    objective = VideoObjective(build_pocket_model(), BASE_DATA, seed=0, num_canvases=8)
    together, alone = objective.batch([3, 4])._asdict(), objective.batch([4])._asdict()
    for name, values in together.items():
        assert torch.allclose(values[1], alone[name][0], atol=1e-5)


def test_the_camera_fills_the_average_band_to_about_unit_variance():
    objective = VideoObjective(build_pocket_model(), BASE_DATA, seed=0, num_canvases=8)
    latents = objective.batch(range(64)).clean
    assert latents.shape == (64, 8, 8, 8, 8)
    assert 0.3 < float(latents[:, :2, 1:].std()) < 1.2


def test_stage_one_and_the_naive_fine_tune_differ_by_the_adapter_alone():
    model = build_pocket_model()
    names = {name for name, _ in model.unet.named_parameters()}
    adapter = {n for n in names if "temporal_adapter" in n or "fusion" in n}
    assert adapter
    assert set(trained_parameters(model, "adapter and U-Net")) == names
    assert set(trained_parameters(model, "U-Net")) == names - adapter


def test_the_temporal_half_has_no_spatial_parameter():
    model = build_pocket_model()
    with_adapter = set(trained_parameters(model, "adapter and temporal blocks"))
    without = set(trained_parameters(model, "temporal blocks"))
    assert without < with_adapter
    assert all("tempor" in name for name in with_adapter)
    assert not any("fusion" in name for name in without)
    groups = {group_of(f"unet.{name}") for name in without}
    assert groups <= {"temporal"}


@pytest.mark.parametrize("trains", get_args(Trains))
def test_fine_tuning_changes_only_what_it_says(
    tmp_path: Path, trains: Trains, monkeypatch: pytest.MonkeyPatch
):
    # Drawing the 1500 pictures of the pool takes longer than a step; 8 do here.
    monkeypatch.setitem(VideoObjective.__init__.__kwdefaults__, "num_canvases", 8)
    model = build_pocket_model()
    load_towers(model)
    before = {name: p.clone() for name, p in model.unet.named_parameters()}
    settings = TrainerSettings(
        steps=1, batch_size=2, warmup_steps=1, learning_rate=1e-3, seed=1, precision="fp32"
    )
    fine_tune(model, tmp_path, data=TUNED_DATA, settings=settings, trains=trains)
    changed = {n for n, p in model.unet.named_parameters() if not p.equal(before[n])}
    assert changed
    assert changed <= set(trained_parameters(model, trains))


def test_the_loss_of_a_perfect_prediction_is_zero():
    objective = VideoObjective(build_pocket_model(), TUNED_DATA, seed=0, num_canvases=8)
    sample = objective.batch(range(2))
    velocity = objective.scheduler.get_velocity(sample.clean, sample.noise, sample.timesteps)

    class Oracle(torch.nn.Module):
        def forward(self, *_: torch.Tensor) -> torch.Tensor:
            return velocity

    assert objective.loss(Oracle(), *sample) == 0
    assert objective.loss(Denoiser(objective.model), *sample) > 0.1


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_captured_step_trains_as_an_eager_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    settings = TrainerSettings(
        steps=12, batch_size=4, warmup_steps=1, learning_rate=1e-3, precision="fp32", log_every=3
    )
    losses: dict[str, list[float]] = {}
    for name in ("captured", "eager"):
        if name == "eager":
            monkeypatch.setattr("motionmerge.training.trainer.WARMUP_RUNS", settings.steps)
        model = build_pocket_model()
        load_towers(model)
        losses[name] = []
        fine_tune(
            model,
            tmp_path / name,
            data=TUNED_DATA,
            settings=settings,
            trains="adapter and U-Net",
            on_progress=lambda progress, to=losses[name]: to.append(progress.loss),
        )
    assert losses["captured"] == pytest.approx(losses["eager"], rel=1e-3)
    assert len(set(losses["captured"])) == 4
