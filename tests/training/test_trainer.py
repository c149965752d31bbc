"""The training loop: exact resume, averaging, determinism, refusals."""

from __future__ import annotations

import io
import json
import os
import pickle
import resource
import signal
from collections.abc import Callable, Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import PartialState
from torch import nn

from motionmerge.errors import CheckpointError, ConfigError, DataError
from motionmerge.training import run_clock
from motionmerge.training.objective import FunctionObjective, LossFunction
from motionmerge.training.run_log import read_log
from motionmerge.training.run_plan import hours_left
from motionmerge.training.samples import ClipOrder, draw_sample
from motionmerge.training.settings import (
    RunStopped,
    TrainerSettings,
    Validation,
    learning_rate_at,
)
from motionmerge.training.trainer import fit

from ..tiny.processes import as_two

SETTINGS = TrainerSettings(
    steps=40, batch_size=4, learning_rate=0.05, warmup_steps=5, ema_decay=0.9, precision="fp32",
    save_every=10, log_every=5,
)  # fmt: skip
ORDER = ClipOrder(num_clips=37)
"""So few clips that 40 steps of 4 samples see each clip four times."""


def regression_loss(module: nn.Module, indices: Sequence[int]) -> torch.Tensor:
    one = {"order": ORDER, "num_views": 1, "num_condition_frames": 1, "drop": 0.0}
    clips = [draw_sample(0, index, **one).clip for index in indices]
    x = torch.stack([torch.randn(3, generator=torch.Generator().manual_seed(i)) for i in clips])
    target = x @ torch.tensor([[1.0], [2.0], [-1.0]])
    return nn.functional.mse_loss(module(x), target)


def make() -> nn.Module:
    torch.manual_seed(0)
    return nn.Linear(3, 1)


def make_with_dropout() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 8), nn.Dropout(0.3), nn.Linear(8, 1))


def train(
    folder: Path,
    settings: TrainerSettings = SETTINGS,
    *,
    loss: LossFunction = regression_loss,
    build: Callable[[], nn.Module] = make,
    **options: Any,
) -> nn.Module:
    module = build()
    fit(module, FunctionObjective(loss), settings, folder, **options)
    return module


def at_step(step: int, what: Callable[[], None], settings: TrainerSettings) -> LossFunction:
    """The loss, and something that happens when the samples of a step are asked for."""

    def loss(module: nn.Module, indices: Sequence[int]) -> torch.Tensor:
        if indices[0] // settings.batch_size == step:
            what()
        return regression_loss(module, indices)

    return loss


def train_and_be_killed(folder: Path, settings: TrainerSettings, *, step: int) -> None:
    """Train in a child process that gets SIGKILL in the middle of a step."""
    child = os.fork()
    if child == 0:
        dies = at_step(step, lambda: os.kill(os.getpid(), signal.SIGKILL), settings)
        try:
            train(folder, settings, loss=dies, build=make_with_dropout)
        finally:
            os._exit(1)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL


def log_of(folder: Path) -> list[dict[str, Any]]:
    lines = map(json.loads, (folder / "log.jsonl").read_text().splitlines())
    return [{key: x[key] for key in x if key != "seconds"} for x in lines]


def test_training_lowers_the_loss_and_logs_it(tmp_path: Path):
    seen = []
    objective = FunctionObjective(regression_loss)
    result = fit(make(), objective, SETTINGS, tmp_path, on_progress=seen.append)
    assert result.loss < 0.2 * seen[0].loss
    assert [p.step for p in seen] == list(range(5, 41, 5))


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_run_that_is_killed_again_and_again_ends_with_the_same_bits(
    tmp_path: Path, accumulate: int
):
    settings = replace(SETTINGS, accumulate=accumulate, save_every=7, log_every=3)
    whole = train(tmp_path / "whole", settings, build=make_with_dropout)
    for step in (3, 8, 23, 23, 39):
        train_and_be_killed(tmp_path / "killed", settings, step=step)
    with (tmp_path / "killed/log.jsonl").open("a") as stream:
        stream.write('{"step": 39, "lo')
    again = train(tmp_path / "killed", settings, build=make_with_dropout)
    for mine, theirs in zip(whole.parameters(), again.parameters(), strict=True):
        assert torch.equal(mine, theirs)
    assert log_of(tmp_path / "killed") == log_of(tmp_path / "whole")
    assert len(list((tmp_path / "killed").glob("state-*.pt"))) == settings.keep_states


def test_dropout_differs_from_step_to_step_and_leaves_the_callers_random_numbers_alone(
    tmp_path: Path,
):
    seen: list[bytes] = []

    def loss(module: nn.Module, indices: Sequence[int]) -> torch.Tensor:
        seen.append(torch.rand(4).numpy().tobytes())
        return regression_loss(module, indices)

    module, before = make(), torch.random.get_rng_state()
    fit(module, FunctionObjective(loss), SETTINGS, tmp_path)
    assert len(set(seen)) == SETTINGS.steps
    assert torch.equal(before, torch.random.get_rng_state())


def test_accumulated_batches_give_the_gradient_of_the_whole(tmp_path: Path):
    one = train(tmp_path / "1")
    for accumulate in (2, 4):
        several = train(tmp_path / str(accumulate), replace(SETTINGS, accumulate=accumulate))
        torch.testing.assert_close(several.weight, one.weight, atol=1e-5, rtol=0)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
def test_a_run_that_is_told_to_stop_saves_its_state(tmp_path: Path, number: int, code: int):
    before = signal.getsignal(number)
    told = at_step(12, lambda: os.kill(os.getpid(), number), SETTINGS)
    with pytest.raises(RunStopped) as stopped:
        train(tmp_path / "stopped", loss=told)
    assert (stopped.value.code, stopped.value.step) == (code, 13)
    assert (tmp_path / "stopped/state-00000013.pt").exists()
    assert signal.getsignal(number) == before
    again = train(tmp_path / "stopped")
    assert torch.equal(again.weight, train(tmp_path / "whole").weight)
    assert log_of(tmp_path / "stopped") == log_of(tmp_path / "whole")


def test_a_second_ctrl_c_ends_a_run_at_once(tmp_path: Path):
    def twice() -> None:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, loss=at_step(12, twice, SETTINGS))
    assert not (tmp_path / "state-00000013.pt").exists()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_loss_that_is_no_number_stops_the_run_and_keeps_batch_and_state(tmp_path: Path):
    def breaks(module: nn.Module, indices: Sequence[int]) -> torch.Tensor:
        return regression_loss(module, indices) * (float("nan") if indices[0] == 17 * 4 else 1)

    with pytest.raises(DataError, match=r"step 18 .*state-00000010\.pt"):
        train(tmp_path, loss=breaks)
    assert torch.load(tmp_path / "bad-batch.pt")["indices"] == [68, 69, 70, 71]
    assert [path.name for path in tmp_path.glob("state-*")] == ["state-00000010.pt"]
    assert torch.isfinite(train(tmp_path).weight).all()


def test_only_the_trainable_parameters_change_and_no_other_gets_a_gradient(tmp_path: Path):
    module, fresh, flags = make(), make(), []

    def loss(module: nn.Module, indices: Sequence[int]) -> torch.Tensor:
        flags.append(fresh.bias.requires_grad and not module.bias.requires_grad)
        return regression_loss(module, indices)

    fit(module, FunctionObjective(loss), SETTINGS, tmp_path, trainable=[module.weight])
    assert not torch.equal(module.weight, fresh.weight)
    assert torch.equal(module.bias, fresh.bias)
    assert all(flags)
    assert module.bias.requires_grad


def test_without_averaging_the_weights_themselves_are_kept(tmp_path: Path):
    settings = replace(SETTINGS, ema_decay=None)
    module = train(tmp_path, settings)
    saved = torch.load(tmp_path / "state-00000040.pt")
    assert torch.equal(module.weight, saved["trained"][0])
    assert not torch.equal(module.weight, train(tmp_path / "averaged").weight)


def other_base() -> nn.Module:
    module = make()
    with torch.no_grad():
        module.weight += 1e-3
    return module


@pytest.mark.parametrize(
    ("what", "options"),
    [
        ("settings", {"settings": replace(SETTINGS, learning_rate=0.1)}),
        ("base", {"build": other_base}),
        ("data", {"identity": {"data": "fast"}}),
    ],
)
def test_the_state_of_another_run_is_refused(tmp_path: Path, what: str, options: dict[str, Any]):
    train(tmp_path, identity={"data": "slow"})
    with pytest.raises(CheckpointError, match=rf"other settings or inputs: {what}:"):
        train(tmp_path, **{"identity": {"data": "slow"}, **options})


def test_the_state_of_a_run_that_trained_other_parameters_is_refused(tmp_path: Path):
    train(tmp_path)
    module = make()
    objective = FunctionObjective(regression_loss)
    with pytest.raises(CheckpointError, match="trained"):
        fit(module, objective, SETTINGS, tmp_path, trainable=[module.weight])


def half_of(content: bytes) -> bytes:
    return content[: len(content) // 2]


def one_bit_of(content: bytes) -> bytes:
    """Flip a bit in the bytes of the trained weights."""
    weights = torch.load(io.BytesIO(content))["trained"][0].numpy().tobytes()
    where = content.index(weights)
    return content[:where] + bytes([content[where] ^ 1]) + content[where + 1 :]


def no_fingerprint_of(content: bytes) -> bytes:
    file = io.BytesIO()
    torch.save({"fingerprint": 5, "step": 40}, file)
    return file.getvalue()


@pytest.mark.parametrize("damage", [half_of, one_bit_of, no_fingerprint_of, lambda _: b""])
def test_a_damaged_state_is_named_and_the_one_before_it_serves(tmp_path: Path, damage):
    keep_one = replace(SETTINGS, keep_states=1)
    whole = train(tmp_path, SETTINGS)
    before, newest = tmp_path / "state-00000030.pt", tmp_path / "state-00000040.pt"
    newest.write_bytes(damage(newest.read_bytes()))
    with pytest.warns(UserWarning, match=f"{newest.name} cannot be read.* from {before.name}"):
        assert torch.equal(train(tmp_path, replace(keep_one, save_every=4)).weight, whole.weight)
    before.unlink(missing_ok=True)
    newest.write_bytes(damage(newest.read_bytes()))
    with pytest.raises(CheckpointError, match="There is no state before"):
        train(tmp_path)


def test_a_pipe_in_place_of_a_state_is_not_waited_for(tmp_path: Path):
    os.mkfifo(tmp_path / "state-00000040.pt")
    with pytest.raises(CheckpointError, match="no plain file"):
        train(tmp_path)


@pytest.mark.parametrize("what", ["trained", "optimizer", "buffers", "ema", "recent", "seconds"])
def test_a_state_that_holds_something_else_is_refused_by_name(tmp_path: Path, what: str):
    def build() -> nn.Module:
        return nn.Sequential(make(), nn.BatchNorm1d(1))

    train(tmp_path, build=build)
    newest = tmp_path / "state-00000040.pt"
    state = torch.load(newest)
    for value in ([], {"x": 1}, "?"):
        torch.save({**state, what: value}, newest)
        with pytest.raises(CheckpointError, match=newest.name):
            train(tmp_path, build=build)


def test_a_full_disk_is_named_and_the_run_goes_on_when_there_is_room(tmp_path: Path):
    whole = train(tmp_path / "whole")
    enough = (tmp_path / "whole/state-00000040.pt").stat().st_size

    def train_on_a_full_disk() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (enough // 2, before[1]))
        try:
            train(tmp_path / "full")
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)

    with pytest.raises(DataError, match=r"Cannot write .*state-00000010.pt: "):
        train_on_a_full_disk()
    assert not list((tmp_path / "full").glob("*state*"))
    assert torch.equal(train(tmp_path / "full").weight, whole.weight)


def test_weights_that_the_last_step_breaks_are_not_kept(tmp_path: Path):
    huge = replace(SETTINGS, steps=1, learning_rate=1e38, weight_decay=1e3, warmup_steps=0)
    with pytest.raises(DataError, match="After step 1 weights are infinite"):
        train(tmp_path, huge)
    assert not list(tmp_path.glob("state-*"))


def test_a_run_whose_log_was_lost_ends_as_well(tmp_path: Path):
    train(tmp_path)
    (tmp_path / "log.jsonl").write_text('{"step": 39, "loss": "?"}\n{"step": 40, "lo')
    module = make()
    assert fit(module, FunctionObjective(regression_loss), SETTINGS, tmp_path).loss is None


@pytest.mark.parametrize("step", ["-1", "9" * 400, "1.5", "true"])
def test_a_line_of_a_log_with_a_step_that_no_run_has_is_refused(tmp_path: Path, step: str):
    log = tmp_path / "log.jsonl"
    log.write_text(f'{{"step": {step}}}\n{{"step": 4}}\n')
    with pytest.raises(DataError, match=r"Line 1 of .* is no line of a log"):
        list(read_log(log))
    log.write_text('{"step": 4}\n')
    assert hours_left(log, 9) is None


def test_fewer_steps_than_were_done_are_refused(tmp_path: Path):
    constant = replace(SETTINGS, decay="none")
    train(tmp_path, constant)
    with pytest.raises(ConfigError, match=r"`settings.steps` is 7, and the run .* has done 40"):
        train(tmp_path, replace(constant, steps=7))


def test_a_run_with_a_constant_rate_can_be_made_longer(tmp_path: Path):
    constant = replace(SETTINGS, decay="none")
    longer = replace(constant, steps=60)
    train(tmp_path / "extended", constant)
    extended = train(tmp_path / "extended", longer)
    assert torch.equal(extended.weight, train(tmp_path / "whole", longer).weight)


def test_a_batch_that_does_not_divide_is_refused(tmp_path: Path):
    with pytest.raises(ConfigError, match="3 accumulated"):
        train(tmp_path, replace(SETTINGS, accumulate=3))


@pytest.mark.skipif(find_spec("bitsandbytes") is not None, reason="it is installed")
def test_eight_bits_without_their_package_are_refused_by_name(tmp_path: Path):
    with pytest.raises(ConfigError, match="needs bitsandbytes") as error:
        train(tmp_path, replace(SETTINGS, optimizer="adamw8bit"))
    assert "motionmerge[adamw8bit]" in str(error.value)


def train_and_keep(folder: Path, settings: TrainerSettings) -> None:
    """Train, and keep what the first process ends with."""
    module = make()
    parameters = list(module.parameters())
    fit(module, FunctionObjective(regression_loss), settings, folder)
    if os.environ["RANK"] == "0":
        torch.save([one.data for one in parameters], folder / "trained.pt")


@pytest.mark.parametrize("shard", [False, True])
def test_two_processes_train_as_one_and_go_on_after_a_kill_bit_for_bit(tmp_path: Path, shard: bool):
    """Without dropout, which differs from process to process."""
    settings = replace(SETTINGS, accumulate=2, shard=shard)

    def killed_and_again() -> None:
        dies = at_step(23, lambda: (_ for _ in ()).throw(KeyboardInterrupt), settings)
        with pytest.raises(KeyboardInterrupt):
            train(tmp_path / "killed", settings, loss=dies)
        train_and_keep(tmp_path / "killed", settings)

    one = train(tmp_path / "one")
    as_two(lambda: train_and_keep(tmp_path / "two", settings))
    as_two(killed_and_again)
    two, killed = (torch.load(tmp_path / name / "trained.pt") for name in ("two", "killed"))
    assert all(map(torch.equal, two, killed))
    for ours, theirs in zip(two, one.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs.data, atol=1e-5, rtol=0)
    assert log_of(tmp_path / "killed") == log_of(tmp_path / "two")
    losses = zip(log_of(tmp_path / "one"), log_of(tmp_path / "two"), strict=True)
    assert all(ours["loss"] == pytest.approx(both["loss"], rel=1e-4) for ours, both in losses)


def test_a_process_that_ends_is_named_by_the_other(tmp_path: Path):
    def lose_one() -> None:
        if os.environ["RANK"] == "1":
            train(tmp_path, loss=at_step(12, lambda: os._exit(0), SETTINGS))
        with pytest.raises(DataError, match="Another process of this run ended"):
            train(tmp_path)

    as_two(lose_one)


def test_the_state_of_a_stranger_runs_nothing_and_a_part_that_is_missing_is_noticed(tmp_path: Path):
    settings = replace(SETTINGS, steps=20, shard=True)
    newest, touched = tmp_path / "state-00000020", tmp_path / "touched"

    class Touch:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.mkdir, (str(touched),)

    def train_on_damaged_states() -> None:
        train(tmp_path, settings)
        if os.environ["RANK"] == "0":
            (newest / ".metadata").rename(tmp_path / "index")
            content = pickle.dumps(Touch()).ljust((tmp_path / "index").stat().st_size)
            (newest / ".metadata").write_bytes(content)
        PartialState().wait_for_everyone()
        with pytest.raises(CheckpointError, match=r"its index asks for posix.mkdir"):
            train(tmp_path, settings)
        PartialState().wait_for_everyone()
        if os.environ["RANK"] == "0":
            (tmp_path / "index").rename(newest / ".metadata")
            next(newest.glob("*.distcp")).write_bytes(b"torn")
        PartialState().wait_for_everyone()
        with pytest.warns(UserWarning, match="has 4 bytes"):
            train(tmp_path, settings)

    as_two(train_on_damaged_states)
    assert not touched.exists()


def test_two_runs_are_kept_from_one_folder(tmp_path: Path):
    again = at_step(3, lambda: train(tmp_path), SETTINGS)
    with pytest.raises(ConfigError, match="Another run is training in"):
        train(tmp_path, loss=again)
    train(tmp_path)


def test_one_process_alone_shards_nothing(tmp_path: Path):
    with pytest.raises(ConfigError, match="this is the only one"):
        train(tmp_path, replace(SETTINGS, shard=True))
    # And whoever asks for more than that is told before.
    assert not list(tmp_path.glob("state-*"))


def test_validations_are_no_part_of_a_steps_time_but_of_what_is_left(tmp_path: Path, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(run_clock.time, "monotonic", lambda: now[0])

    def loss(module: nn.Module, indices: Sequence[int]) -> torch.Tensor:
        now[0] += 2.0
        return regression_loss(module, indices)

    def measure(module: nn.Module, step: int) -> dict[str, Any]:
        now[0] += 100.0
        return {}

    seen: list[Any] = []
    short = replace(SETTINGS, decay="none", steps=10, save_minutes=1e9)
    options = {"validation": Validation(4, measure), "on_progress": seen.append}
    train(tmp_path, short, loss=loss, **options)
    train(tmp_path, replace(short, steps=20), loss=loss, **options)
    assert [one.step_seconds for one in seen] == [2.0] * 4
    # Logged after steps 5, 10, 15 and 20, each before its own validation.
    assert [one.seconds_left for one in seen] == [10 + 200, 100, 10 + 200, 100]
    assert [one.seconds for one in seen] == [210, 320, 530, 640]


def test_the_learning_rate_warms_up_and_falls_to_zero_or_stays():
    rates = [learning_rate_at(step, SETTINGS) for step in range(SETTINGS.steps)]
    assert rates[0] == pytest.approx(0.01)
    assert max(rates) == pytest.approx(SETTINGS.learning_rate)
    assert rates[-1] < 0.01 * SETTINGS.learning_rate
    assert learning_rate_at(39, replace(SETTINGS, decay="none")) == SETTINGS.learning_rate
