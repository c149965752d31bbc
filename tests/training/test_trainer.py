"""The training loop: resume, averaging, determinism, refusals."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from motionmerge.errors import CheckpointError
from motionmerge.training.trainer import CpuObjective, TrainerSettings, fit, learning_rate_at

SETTINGS = TrainerSettings(
    steps=40, batch_size=4, learning_rate=0.05, warmup_steps=5, ema_decay=0.9, precision="no",
    save_every=10, log_every=5,
)  # fmt: skip


def regression_loss(module: nn.Module, indices: Sequence[int]) -> torch.Tensor:
    x = torch.stack([torch.randn(3, generator=torch.Generator().manual_seed(i)) for i in indices])
    target = x @ torch.tensor([[1.0], [2.0], [-1.0]])
    return nn.functional.mse_loss(module(x), target)


def make() -> nn.Module:
    torch.manual_seed(0)
    return nn.Linear(3, 1)


class Killed(Exception):
    pass


def test_training_lowers_the_loss_and_logs_it(tmp_path: Path):
    seen = []
    result = fit(make(), CpuObjective(regression_loss), SETTINGS, tmp_path, on_progress=seen.append)
    assert result.loss < 0.2 * seen[0].loss
    assert [p.step for p in seen] == list(range(5, 41, 5))


def test_a_run_that_was_killed_goes_on_to_the_same_weights(tmp_path: Path):
    whole, resumed = make(), make()
    fit(whole, CpuObjective(regression_loss), SETTINGS, tmp_path / "whole")

    def dies(module: nn.Module, indices: Sequence[int]) -> torch.Tensor:
        if indices[0] >= 25 * SETTINGS.batch_size:
            raise Killed
        return regression_loss(module, indices)

    with pytest.raises(Killed):
        fit(resumed, CpuObjective(dies), SETTINGS, tmp_path / "killed")
    again = make()
    fit(again, CpuObjective(regression_loss), SETTINGS, tmp_path / "killed")
    assert torch.equal(whole.weight, again.weight)
    assert torch.equal(whole.bias, again.bias)


def test_only_the_trainable_parameters_change(tmp_path: Path):
    module, fresh = make(), make()
    fit(module, CpuObjective(regression_loss), SETTINGS, tmp_path, trainable=[module.weight])
    assert not torch.equal(module.weight, fresh.weight)
    assert torch.equal(module.bias, fresh.bias)


def test_a_state_of_other_settings_is_refused(tmp_path: Path):
    fit(make(), CpuObjective(regression_loss), SETTINGS, tmp_path)
    with pytest.raises(CheckpointError, match="other settings"):
        fit(make(), CpuObjective(regression_loss), replace(SETTINGS, learning_rate=0.1), tmp_path)


def test_the_learning_rate_warms_up_and_falls_to_zero():
    rates = [learning_rate_at(step, SETTINGS) for step in range(SETTINGS.steps)]
    assert rates[0] == pytest.approx(0.01)
    assert max(rates) == pytest.approx(SETTINGS.learning_rate)
    assert rates[-1] < 0.01 * SETTINGS.learning_rate
