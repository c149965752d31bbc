"""The training loop: AdamW, warm-up and cosine, EMA, resume after a kill, any number of processes.

A batch is a range of sample indices and every sample is drawn from (seed, index) alone, so a run is
the same whether it was interrupted or not, and on one process or several, up to rounding.

A small network leaves a GPU idle while Python looks for the next kernel. So on one GPU, worker
processes draw the samples and a step, optimizer and all, is captured once and replayed.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from accelerate.utils import send_to_device
from diffusers.training_utils import EMAModel
from torch import nn
from torch.utils.data import DataLoader, Dataset

from motionmerge.errors import CheckpointError, ConfigError
from motionmerge.io.atomic import atomic_path
from motionmerge.models.cuda_graphs import ReplayedCall

LossFunction = Callable[[nn.Module, Sequence[int]], torch.Tensor]
"""Takes the (possibly wrapped) module and sample indices; returns the mean loss."""

MAX_WORKERS = 14
"""Processes that draw samples for a GPU."""

WARMUP_RUNS = 3
"""Steps before one is captured: they allocate the optimizer's state and pick kernels."""

Drawn = Any
"""What `draw` makes of sample indices: tensors in tuples, named or not."""


class Objective(Protocol):
    """A loss in three steps, so that a GPU need not wait for any of them."""

    @property
    def can_use_gpu(self) -> bool: ...

    @property
    def draw(self) -> Callable[[Sequence[int]], Drawn]:
        """Sample indices to tensors on the CPU, in another process: it must pickle."""
        ...

    def to(self, device: torch.device) -> None:
        """Move what `prepare` needs."""
        ...

    def prepare(self, drawn: Drawn) -> tuple[torch.Tensor, ...]:
        """Convert what was drawn, on the device, to what the loss needs; no gradients."""
        ...

    def loss(self, module: nn.Module, *prepared: torch.Tensor) -> torch.Tensor:
        """Compute the mean loss.

        No `.item()` and no branch on values: the call is captured as a CUDA graph.
        """
        ...


class CpuObjective:
    """A `LossFunction` as an `Objective` that stays on the CPU."""

    can_use_gpu = False

    def __init__(self, loss_function: LossFunction) -> None:
        self._loss_function = loss_function

    @property
    def draw(self) -> Callable[[Sequence[int]], Drawn]:
        return torch.tensor

    def to(self, device: torch.device) -> None:
        """Move nothing: `fit` heeds `can_use_gpu`."""

    def prepare(self, drawn: Drawn) -> tuple[torch.Tensor, ...]:
        return (drawn,)

    def loss(self, module: nn.Module, *prepared: torch.Tensor) -> torch.Tensor:
        return self._loss_function(module, prepared[0].tolist())


@dataclass(frozen=True, kw_only=True)
class TrainerSettings:
    """How to optimize.

    Args:
        steps: Optimizer steps.
        batch_size: Samples a step, over all processes.
        learning_rate: At the end of the warm-up; falls to zero along a cosine.
        warmup_steps: Linear warm-up.
        weight_decay: Of AdamW.
        ema_decay: Of the running average of the weights, which is what is kept.
        max_grad_norm: Gradients are clipped to this norm.
        seed: Seeds samples, noise and initial weights.
        precision: "bf16" (autocast) or "no".
        save_every, log_every: In steps.
    """

    steps: int
    batch_size: int = 16
    learning_rate: float = 1e-3
    warmup_steps: int = 200
    weight_decay: float = 0.01
    ema_decay: float = 0.999
    max_grad_norm: float = 1.0
    seed: int = 0
    precision: str = "bf16"
    save_every: int = 100
    log_every: int = 25


@dataclass(frozen=True, kw_only=True)
class TrainingResult:
    """What a run did.

    Args:
        steps: Optimizer steps, in all.
        loss: Mean loss over the last tenth of the run.
        seconds: Wall time, over all sittings.
        num_processes: Of the last sitting.
        is_main_process: Whether this process is the one to write files.
        device: "cpu", or the name of the GPU.
    """

    steps: int
    loss: float
    seconds: float
    num_processes: int
    is_main_process: bool
    device: str


@dataclass(frozen=True, kw_only=True)
class TrainingProgress:
    """One line of the log: `step` of `steps` done in `seconds`."""

    step: int
    steps: int
    loss: float
    learning_rate: float
    seconds: float


def learning_rate_at(step: int, settings: TrainerSettings) -> float:
    """Compute the learning rate: warm-up, then cosine to zero."""
    if step < settings.warmup_steps:
        return settings.learning_rate * (step + 1) / settings.warmup_steps
    share = (step - settings.warmup_steps) / max(1, settings.steps - settings.warmup_steps)
    return settings.learning_rate * 0.5 * (1 + math.cos(math.pi * share))


def fit(
    module: nn.Module,
    objective: Objective,
    settings: TrainerSettings,
    folder: Path,
    *,
    trainable: Iterable[nn.Parameter] | None = None,
    kernels: Callable[[torch.device], AbstractContextManager[None]] | None = None,
    on_progress: Callable[[TrainingProgress], None] | None = None,
) -> TrainingResult:
    """Train `module` in place and leave it with the averaged (EMA) weights, on the CPU.

    The state is saved to `folder/state.pt` (atomically) and picked up again when it is there; the
    log is `folder/log.jsonl`.

    Args:
        module: The network; its convolutions keep `requires_grad`, trained or not (a frozen one
            crashes CPU bf16 backward in torch 2.13).
        objective: What to minimize, on a GPU if it can and there is one.
        settings: How to optimize.
        folder: Where state and log go; made when missing.
        trainable: The parameters to optimize; all by default.
        kernels: Context in which the loss is computed, for models that choose their kernels.
        on_progress: Called after each logged step, on the main process.

    Raises:
        ConfigError: the batch does not divide by the number of processes.
        CheckpointError: the saved state belongs to other settings.
    """
    accelerator = Accelerator(cpu=not (objective.can_use_gpu and torch.cuda.is_available()))
    device = accelerator.device
    share, rest = divmod(settings.batch_size, accelerator.num_processes)
    if rest:
        raise ConfigError(
            f"A batch of {settings.batch_size} does not divide by {accelerator.num_processes} "
            "processes.",
            fix="Choose a batch size that does.",
        )
    module.to(device)
    objective.to(device)
    parameters = list(module.parameters() if trainable is None else trainable)
    optimizer = torch.optim.AdamW(parameters, weight_decay=settings.weight_decay)
    ema = EMAModel(
        parameters, decay=settings.ema_decay, use_ema_warmup=True, power=0.75, foreach=True
    )
    state = _State(folder, module, optimizer, ema, settings)
    first_step, elapsed = state.load()
    ema.to(device)
    wrapped, optimizer = accelerator.prepare(module, optimizer)
    wrapped.train()
    rate = torch.zeros((), device=device)
    for group in optimizer.param_groups:
        group.update(lr=rate, capturable=device.type == "cuda")

    def chosen_kernels() -> AbstractContextManager[None]:
        return nullcontext() if kernels is None else kernels(device)

    def train_step(*prepared: torch.Tensor) -> torch.Tensor:
        with chosen_kernels(), _autocast(device, settings):
            loss = objective.loss(wrapped, *prepared)
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(parameters, settings.max_grad_norm)
        optimizer.step()
        module.zero_grad(set_to_none=True)
        return loss.detach()

    run_step: Callable[..., torch.Tensor] = train_step
    if device.type == "cuda" and accelerator.num_processes == 1:
        run_step = _CapturedStep(train_step, device)
    started = time.monotonic() - elapsed
    recent: list[torch.Tensor] = []
    batches = _batches(objective, settings, first_step, share, accelerator.process_index, device)
    for step, drawn in enumerate(batches, first_step):
        learning_rate = learning_rate_at(step, settings)
        rate.fill_(learning_rate)
        recent = [*recent[1 - settings.log_every :], run_step(*objective.prepare(drawn))]
        ema.step(parameters)
        done = step + 1
        if accelerator.is_main_process:
            if done % settings.log_every == 0 or done == settings.steps:
                mean = float(torch.stack(recent).mean())
                seconds = time.monotonic() - started
                progress = TrainingProgress(
                    step=done,
                    steps=settings.steps,
                    loss=mean,
                    learning_rate=learning_rate,
                    seconds=round(seconds, 1),
                )
                state.log(progress)
                if on_progress is not None:
                    on_progress(progress)
            if done % settings.save_every == 0 or done == settings.steps:
                state.save(done, time.monotonic() - started)
    ema.copy_to(parameters)
    module.to("cpu")
    objective.to(torch.device("cpu"))
    accelerator.wait_for_everyone()
    return TrainingResult(
        steps=settings.steps,
        loss=state.final_loss(),
        seconds=time.monotonic() - started,
        num_processes=accelerator.num_processes,
        is_main_process=accelerator.is_main_process,
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
    )


def _autocast(device: torch.device, settings: TrainerSettings) -> torch.autocast:
    return torch.autocast(device.type, torch.bfloat16, enabled=settings.precision == "bf16")


class _Batches(Dataset[Drawn]):
    """What to draw in each step that is left, by one of several processes."""

    def __init__(
        self,
        draw: Callable[[Sequence[int]], Drawn],
        settings: TrainerSettings,
        first_step: int,
        share: int,
        process: int,
    ) -> None:
        self._draw, self._settings, self._first_step = draw, settings, first_step
        self._share, self._process = share, process

    def __len__(self) -> int:
        return self._settings.steps - self._first_step

    def __getitem__(self, index: int) -> Drawn:
        start = (self._first_step + index) * self._settings.batch_size
        start += self._process * self._share
        return self._draw(range(start, start + self._share))


def _batches(
    objective: Objective,
    settings: TrainerSettings,
    first_step: int,
    share: int,
    process: int,
    device: torch.device,
) -> Iterator[Drawn]:
    """Yield each step's batch on the device; for a GPU, worker processes draw ahead."""
    batches = _Batches(objective.draw, settings, first_step, share, process)
    if device.type == "cpu":
        yield from (batches[index] for index in range(len(batches)))
        return
    workers = max(1, min(MAX_WORKERS, (os.cpu_count() or 1) - 2))
    loader = DataLoader(
        batches, batch_size=None, num_workers=workers, prefetch_factor=4, pin_memory=True
    )
    for drawn in loader:
        yield send_to_device(drawn, device, non_blocking=True)


class _CapturedStep:
    """Run a training step as it is a few times, then capture it as a CUDA graph and replay that.

    Everything that differs from step to step reaches the graph through its inputs' memory, or
    through tensors that are changed in place (the learning rate).
    """

    def __init__(self, step: Callable[..., torch.Tensor], device: torch.device) -> None:
        self._step, self._stream, self._runs = step, torch.cuda.Stream(device), 0
        self._replayed: ReplayedCall | None = None

    def __call__(self, *prepared: torch.Tensor) -> torch.Tensor:
        self._runs += 1
        if self._runs <= WARMUP_RUNS:
            self._stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self._stream):
                loss = self._step(*prepared)
            torch.cuda.current_stream().wait_stream(self._stream)
            return loss
        if self._replayed is None:
            self._replayed = ReplayedCall(self._step, prepared, self._stream)
        return self._replayed(*prepared)


class _State:
    """The resumable state of a run on disk."""

    def __init__(
        self,
        folder: Path,
        module: nn.Module,
        optimizer: torch.optim.Optimizer,
        ema: EMAModel,
        settings: TrainerSettings,
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.module, self.optimizer, self.ema = folder, module, optimizer, ema
        self.settings = {
            k: v for k, v in asdict(settings).items() if k not in ("save_every", "log_every")
        }

    @property
    def path(self) -> Path:
        return self.folder / "state.pt"

    def load(self) -> tuple[int, float]:
        """Restore what was saved; returns (next step, seconds so far)."""
        if not self.path.exists():
            return 0, 0.0
        saved = torch.load(self.path, map_location="cpu", weights_only=True)
        if saved["settings"] != self.settings:
            raise CheckpointError(
                f"{self.path} was saved with other settings: {saved['settings']}, now "
                f"{self.settings}",
                fix="Choose another run folder, or remove this one to start again.",
            )
        self.module.load_state_dict(saved["module"])
        self.optimizer.load_state_dict(saved["optimizer"])
        self.ema.load_state_dict(saved["ema"])
        return saved["step"], saved["seconds"]

    def save(self, step: int, seconds: float) -> None:
        state = {
            "step": step,
            "seconds": seconds,
            "settings": self.settings,
            "module": self.module.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "ema": self.ema.state_dict(),
        }
        with atomic_path(self.path) as temporary:
            torch.save(state, temporary)

    def final_loss(self) -> float:
        """Return the mean of what was logged over the last tenth of the run."""
        lines = map(json.loads, (self.folder / "log.jsonl").read_text().splitlines())
        losses = [x["loss"] for x in lines if x["step"] > 0.9 * self.settings["steps"]]
        return sum(losses) / len(losses)

    def log(self, progress: TrainingProgress) -> None:
        with (self.folder / "log.jsonl").open("a") as stream:
            stream.write(json.dumps(asdict(progress)) + "\n")
