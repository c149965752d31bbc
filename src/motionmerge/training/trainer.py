"""The training loop: AdamW, warm-up and cosine, EMA, resume after a kill, any number of processes.

A batch is a range of sample indices, every sample is drawn from (seed, index) alone, and torch is
seeded from (seed, step, process) before each step. So a run is the same, bit for bit, whether it
was interrupted or not; and on one process or several up to rounding, where there is no dropout.

A small network leaves a GPU idle while Python looks for the next kernel. So on one GPU, worker
processes draw the samples and a step, optimizer and all, is captured once and replayed.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from diffusers.training_utils import EMAModel
from torch import nn

from motionmerge.errors import CheckpointError, ConfigError
from motionmerge.rng import whole_number_for

from .batches import batches_left
from .captured_step import CapturedStep
from .finite import are_finite, bad_weights, check_figures
from .objective import Drawn, Objective
from .optimizer import optimizer_of
from .run_clock import RunClock
from .run_log import LOG, VALIDATION_LOG
from .run_state import RunFolder, fingerprint_of
from .settings import (
    RunStopped,
    TrainerSettings,
    TrainingProgress,
    TrainingResult,
    Validation,
    learning_rate_at,
)
from .sharding import ShardedParameters, whole
from .while_training import (
    alone_in,
    checkpointing,
    frozen_but,
    lost_processes_named,
    told_to_stop,
)


def fit(
    module: nn.Module,
    objective: Objective,
    settings: TrainerSettings,
    folder: Path,
    *,
    trainable: Iterable[nn.Parameter] | None = None,
    identity: Mapping[str, Any] | None = None,
    kernels: Callable[[torch.device], AbstractContextManager[None]] | None = None,
    validation: Validation | None = None,
    on_progress: Callable[[TrainingProgress], None] | None = None,
) -> TrainingResult:
    """Train `module` in place and leave it with the averaged (EMA) weights, on the CPU.

    States are saved to `folder` (atomically) and the newest is picked up again; the log is
    `folder/log.jsonl`. What is not trained gets no gradients meanwhile.

    Args:
        module: The network.
        objective: What to minimize, on a GPU if it can and there is one.
        settings: How to optimize.
        folder: Where states and log go; made when missing.
        trainable: The parameters to optimize; all by default.
        identity: What makes this run another than one with the same settings, module and trained
            parameters: its data and objective. JSON values.
        kernels: Context in which the loss is computed, for models that choose their kernels.
        validation: What is measured meanwhile, with the averaged weights; see there. It is kept in
            `folder/validation.jsonl`.
        on_progress: Called after each logged step, on the main process.

    Raises:
        ConfigError: the batch does not divide by the number of processes and accumulated batches,
            or another run is training in the folder.
        CheckpointError: the saved state belongs to another run, or none of several can be read.
        DataError: the loss is not a number; the batch is saved, and the state before it kept.
            Or the weights are not, the disk is full, or another process of the run ended.
        RunStopped: the process was told to end (SIGTERM, Ctrl-C); the state is saved.
    """
    accelerator = Accelerator(cpu=not (objective.can_use_gpu and torch.cuda.is_available()))
    share = _share(settings, accelerator.num_processes)
    parameters = list(module.parameters() if trainable is None else trainable)
    fingerprint = fingerprint_of(module, parameters, settings, identity or {})
    with ExitStack() as cleanup:
        if accelerator.is_main_process:
            cleanup.enter_context(alone_in(folder))
        cleanup.enter_context(frozen_but(module, parameters))
        if settings.gradient_checkpointing:
            cleanup.enter_context(checkpointing(module))
        cleanup.enter_context(torch.random.fork_rng())
        run = _Run(
            module,
            objective,
            settings,
            RunFolder(folder, fingerprint, keep=settings.keep_states),
            parameters,
            accelerator,
            kernels,
            validation,
        )
        request = cleanup.enter_context(told_to_stop())
        if accelerator.num_processes > 1:
            cleanup.enter_context(lost_processes_named())
        run.restore()
        run.make_ready()
        if run.done == 0:
            run.validate()
        batches = batches_left(
            objective, settings, run.done, share, accelerator.process_index, accelerator.device
        )
        for drawn in batches:
            run.step(drawn)
            if run.is_logged_now and (progress := run.log()) and on_progress is not None:
                on_progress(progress)
            run.validate()
            is_told = _any_process(accelerator, is_true=request.number is not None)
            if run.is_saved_now or is_told:
                run.save()
            if is_told and run.done < settings.steps:
                raise RunStopped(run.done, folder, request.number)
        return run.finish()


def _share(settings: TrainerSettings, num_processes: int) -> int:
    """Return the samples of one batch of one process."""
    share, rest = divmod(settings.batch_size, num_processes * settings.accumulate)
    if rest or not share:
        raise no_share(settings, num_processes)
    return share


def no_share(settings: TrainerSettings, num_processes: int) -> ConfigError:
    """Return the error for a batch that cannot be shared evenly."""
    processes = "1 process" if num_processes == 1 else f"{num_processes} processes"
    return ConfigError(
        f"A batch of {settings.batch_size} does not divide by {processes} with "
        f"{settings.accumulate} accumulated batches.",
        fix="Choose a batch size that does.",
    )


def _any_process(accelerator: Accelerator, *, is_true: bool) -> bool:
    if accelerator.num_processes == 1:
        return is_true
    count = torch.tensor(float(is_true), device=accelerator.device)
    return bool(accelerator.reduce(count, "sum") > 0)


class _Run:
    """A run under way: its modules, optimizer, averages and books."""

    def __init__(
        self,
        module: nn.Module,
        objective: Objective,
        settings: TrainerSettings,
        books: RunFolder,
        parameters: list[nn.Parameter],
        accelerator: Accelerator,
        kernels: Callable[[torch.device], AbstractContextManager[None]] | None,
        validation: Validation | None,
    ) -> None:
        self.module, self.objective, self.settings = module, objective, settings
        self.books, self.parameters, self.accelerator = books, parameters, accelerator
        self.kernels, self.device = kernels, accelerator.device
        self.validation = validation
        self.done, self.elapsed = 0, 0.0
        self.sharded: ShardedParameters | None = None
        if settings.shard:
            self.sharded = ShardedParameters(module, parameters, accelerator)
            self.parameters = parameters = self.sharded.parameters
        module.to(self.device)
        objective.to(self.device)
        self.optimizer = optimizer_of(parameters, settings)
        self.ema: EMAModel | None = None
        if settings.ema_decay is not None:
            self.ema = EMAModel(
                parameters,
                decay=settings.ema_decay,
                use_ema_warmup=True,
                power=0.75,
                foreach=self.sharded is None,  # torch cannot copy many sharded tensors at once
            )
        self.recent: list[torch.Tensor] = []
        """Loss and gradient norm of each step since the last line of the log."""

    def restore(self) -> None:
        """Load the newest state if there is one, and drop what was logged after it."""
        saved = self.books.load()
        if saved is not None:
            try:
                self._restore_from(saved)
            except (LookupError, TypeError, ValueError, AttributeError, RuntimeError) as error:
                raise CheckpointError(
                    f"{saved['path']} is no state of such a run: {str(error)[:200]}",
                    fix="Remove it: the run goes on from the state before it.",
                ) from error
            if self.done > self.settings.steps:
                raise ConfigError(
                    f"`settings.steps` is {self.settings.steps}, and the run in "
                    f"{self.books.folder} has done {self.done}.",
                    fix=f"Ask for {self.done} or more, or choose another run folder.",
                )
        if self.accelerator.is_main_process:
            for name in (LOG, VALIDATION_LOG):
                self.books.trim_log(self.done, name=name)

    def make_ready(self) -> None:
        """Wrap the module for several processes, choose how steps run, and start the clock."""
        if self.ema is not None:
            self.ema.to(self.device)
        self.wrapped = self.module
        if self.sharded is None:
            self.wrapped, self.optimizer = self.accelerator.prepare(self.module, self.optimizer)
        self.wrapped.train()
        self.rate = torch.zeros((), device=self.device)
        for group in self.optimizer.param_groups:
            group.update(lr=self.rate)
            if self.settings.optimizer == "adamw":
                group.update(capturable=self.device.type == "cuda")
        self.run_step: Callable[..., torch.Tensor] = self._step
        is_alone = self.accelerator.num_processes == self.settings.accumulate == 1
        is_alike = self.objective.is_captured and not self.settings.gradient_checkpointing
        is_alike = is_alike and self.settings.optimizer == "adamw"
        if self.device.type == "cuda" and is_alone and is_alike:
            self.run_step = CapturedStep(self._step, self.device)
        self.clock = RunClock(step=self.done, seconds=self.elapsed)
        self.saved_at = time.monotonic()

    def _restore_from(self, saved: Mapping[str, Any]) -> None:
        self._restore_parameters(saved)
        for name, buffer in self.module.named_buffers():
            buffer.copy_(saved["buffers"][name])
        self.done, self.elapsed = saved["step"], float(saved["seconds"])
        self.recent = self._recent_of(saved["recent"])

    def _restore_parameters(self, saved: Mapping[str, Any]) -> None:
        """Load trained parameters, moments and averages."""
        average = saved["ema"]
        if self.sharded is not None:
            self.sharded.load(saved["path"], self.optimizer, self.ema)
            if self.ema is not None:
                average = {**average, "shadow_params": self.ema.shadow_params}
        else:
            for mine, then in zip(self.parameters, saved["trained"], strict=True):
                mine.data.copy_(then)
            self.optimizer.load_state_dict(saved["optimizer"])
        if self.ema is not None:
            kept = ("shadow_params", "optimization_step")  # diffusers goes on without
            self.ema.load_state_dict({**average, **{name: average[name] for name in kept}})

    def _recent_of(self, saved: torch.Tensor) -> list[torch.Tensor]:
        """Return this process's share of what was not yet logged, `[processes, steps, 2]`."""
        if len(saved) != self.accelerator.num_processes:  # another number: all have the mean
            saved = saved.mean(0, keepdim=True).expand(self.accelerator.num_processes, -1, -1)
        return list(saved[self.accelerator.process_index].to(self.device).unbind())

    def step(self, drawn: Sequence[Drawn]) -> None:
        """Do one optimizer step on the batches of this process."""
        names = ("training step", str(self.done), str(self.accelerator.process_index))
        torch.manual_seed(whole_number_for(self.settings.seed, *names))
        self.rate.fill_(learning_rate_at(self.done, self.settings))
        if len(drawn) == 1:
            figures = self.run_step(*self.objective.prepare(drawn[0]))
        else:
            figures = self._accumulated(drawn)
        self.recent.append(figures)
        if self.ema is not None:
            self.ema.step(self.parameters)
        self.done += 1
        if self.device.type == "cpu":
            self._check_finite()

    def _loss(self, *prepared: Any) -> torch.Tensor:
        kernels = nullcontext() if self.kernels is None else self.kernels(self.device)
        with kernels, _autocast(self.device, self.settings):
            return self.objective.loss(self.wrapped, *prepared)

    def _step(self, *prepared: Any) -> torch.Tensor:
        loss = self._loss(*prepared)
        self.accelerator.backward(loss)
        return self._optimize(loss.detach())

    def _accumulated(self, drawn: Sequence[Drawn]) -> torch.Tensor:
        total = torch.zeros((), device=self.device)
        for number, one in enumerate(drawn, 1):
            is_last = number == len(drawn)
            sync = nullcontext() if is_last else self.accelerator.no_sync(self.wrapped)
            with sync:
                loss = self._loss(*self.objective.prepare(one)) / len(drawn)
                self.accelerator.backward(loss)
            total += loss.detach()
        return self._optimize(total)

    def _optimize(self, loss: torch.Tensor) -> torch.Tensor:
        norm = self.accelerator.clip_grad_norm_(self.parameters, self.settings.max_grad_norm)
        self.optimizer.step()
        self.module.zero_grad(set_to_none=True)
        norm = whole(torch.as_tensor(norm))
        return torch.stack([loss.float(), norm.to(loss.device).float()])

    @property
    def is_logged_now(self) -> bool:
        return self.done % self.settings.log_every == 0 or self.done == self.settings.steps

    @property
    def is_saved_now(self) -> bool:
        # By time on one process only: the clocks of several differ.
        is_old = time.monotonic() - self.saved_at > 60 * self.settings.save_minutes
        is_due = self.done % self.settings.save_every == 0 or self.done == self.settings.steps
        return is_due or (is_old and self.accelerator.num_processes == 1)

    def log(self) -> TrainingProgress | None:
        """Write a line of the log; returns it on the main process."""
        self._check_finite()
        loss, norm = torch.stack(self.recent).mean(0)
        loss = self.accelerator.reduce(loss, "mean")
        self.recent = []
        if not self.accelerator.is_main_process:
            return None
        progress = TrainingProgress(
            step=self.done,
            steps=self.settings.steps,
            loss=float(loss),
            grad_norm=float(norm),
            learning_rate=learning_rate_at(self.done - 1, self.settings),
            seconds=round(self.clock.seconds, 1),
            step_seconds=self.clock.step_seconds(self.done),
            seconds_left=self.clock.seconds_left(
                self.done,
                self.settings.steps,
                validates_every=None if self.validation is None else self.validation.every,
            ),
        )
        line = asdict(progress)
        for name in ("step_seconds", "seconds_left"):  # of this sitting, and guesses
            del line[name]
        self.books.log(line)
        return progress

    def validate(self) -> None:
        """Measure what is to be measured after this step, on the main process."""
        validation = self.validation
        # Of a sharded network every process has to compute its part.
        is_idle = self.sharded is None and not self.accelerator.is_main_process
        if validation is None or is_idle:
            return
        if self.done % validation.every and self.done != self.settings.steps:
            return
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)  # the steps before are no part of it
        with self.clock.validating():
            figures = self._measured(validation)
        if self.accelerator.is_main_process:
            self.books.log({"step": self.done, **figures}, name=VALIDATION_LOG)

    def _measured(self, validation: Validation) -> Mapping[str, Any]:
        """Measure with the averaged weights; afterwards all is as before."""
        if self.ema is not None:
            self.ema.store(self.parameters)
            self.ema.copy_to(self.parameters)
        self.module.eval()
        with torch.no_grad(), _autocast(self.device, self.settings):
            figures = validation.measure(self.module, self.done)
        self.module.train()
        if self.ema is not None:
            self.ema.restore(self.parameters)
        return figures

    def save(self) -> None:
        """Save the state, if there are numbers in it."""
        self._check_finite()
        self._check_weights()
        self.saved_at = time.monotonic()
        recent = torch.stack(self.recent) if self.recent else torch.zeros(0, 2, device=self.device)
        recent = self.accelerator.gather(recent[None])
        state = {
            "seconds": self.clock.seconds,
            "buffers": dict(self.module.named_buffers()),
            "ema": None if self.ema is None else self.ema.state_dict(),
            "recent": recent.cpu(),
        }
        if self.sharded is not None:
            folder = self.books.unfinished(self.done)
            self.sharded.save(folder, self.optimizer, self.ema)
            state["ema"] = None if self.ema is None else {**state["ema"], "shadow_params": []}
            if self.accelerator.is_main_process:
                self.books.finish(self.done, state)
            self.accelerator.wait_for_everyone()
            return
        if self.accelerator.is_main_process:
            trained = [parameter.data for parameter in self.parameters]
            optimizer = self.optimizer.state_dict()
            self.books.save(self.done, {**state, "trained": trained, "optimizer": optimizer})

    def _check_finite(self) -> None:
        """Refuse to go on with a loss or gradient that is not a number; keep its batch."""
        check_figures(
            self.recent,
            self.books,
            done=self.done,
            batch_size=self.settings.batch_size,
            draw=self.objective.draw if self.accelerator.is_main_process else None,
        )

    def _check_weights(self) -> None:
        """Refuse weights that are no numbers: those of the last step have no loss to show it."""
        if _any_process(self.accelerator, is_true=not are_finite(self.parameters)):
            raise bad_weights(self.done, self.books)

    def finish(self) -> TrainingResult:
        """Leave the module with the weights to keep, on the CPU."""
        if self.ema is not None:
            self.ema.copy_to(self.parameters)
        if self.sharded is not None:
            self.sharded.gather()
        else:
            self.module.to("cpu")
        self.objective.to(torch.device("cpu"))
        self.accelerator.wait_for_everyone()
        is_cuda = self.device.type == "cuda"
        return TrainingResult(
            steps=self.settings.steps,
            loss=self.books.last_loss(self.settings.steps),
            seconds=self.clock.seconds,
            num_processes=self.accelerator.num_processes,
            is_main_process=self.accelerator.is_main_process,
            device=torch.cuda.get_device_name(self.device) if is_cuda else self.device.type,
        )


def _autocast(device: torch.device, settings: TrainerSettings) -> torch.autocast:
    return torch.autocast(device.type, torch.bfloat16, enabled=settings.precision == "bf16")
