"""The training loop: AdamW, warm-up and cosine, EMA, resume after a kill, any number of processes.

A batch is a range of sample indices and every sample is drawn from (seed, index) alone, so a run is
the same whether it was interrupted or not, and on one process or several, up to rounding.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from diffusers.training_utils import EMAModel
from torch import nn

from motionmerge.errors import CheckpointError, ConfigError
from motionmerge.models.pocket.components import attention_kernel

LossFunction = Callable[[nn.Module, Sequence[int]], torch.Tensor]
"""Takes the (possibly wrapped) module and sample indices; returns the mean loss."""


@dataclass(frozen=True)
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


@dataclass(frozen=True)
class TrainingResult:
    """What a run did.

    Args:
        steps: Optimizer steps, in all.
        loss: Mean loss over the last tenth of the run.
        seconds: Wall time, over all sittings.
        num_processes: Of the last sitting.
        is_main_process: Whether this process is the one to write files.
    """

    steps: int
    loss: float
    seconds: float
    num_processes: int
    is_main_process: bool


@dataclass(frozen=True)
class Progress:
    """One line of the log: `step` of `steps` done in `seconds`."""

    step: int
    steps: int
    loss: float
    learning_rate: float
    seconds: float


def learning_rate_at(step: int, settings: TrainerSettings) -> float:
    """Warm-up, then cosine to zero."""
    if step < settings.warmup_steps:
        return settings.learning_rate * (step + 1) / settings.warmup_steps
    share = (step - settings.warmup_steps) / max(1, settings.steps - settings.warmup_steps)
    return settings.learning_rate * 0.5 * (1 + math.cos(math.pi * share))


def fit(
    module: nn.Module,
    loss_function: LossFunction,
    settings: TrainerSettings,
    folder: Path,
    *,
    trainable: Iterable[nn.Parameter] | None = None,
    on_progress: Callable[[Progress], None] | None = None,
) -> TrainingResult:
    """Train `module` in place and leave it with the averaged (EMA) weights.

    The state is saved to `folder/state.pt` (atomically) and picked up again when it is there; the
    log is `folder/log.jsonl`.

    Args:
        module: The network; its convolutions keep `requires_grad`, trained or not (a frozen one
            crashes CPU bf16 backward in torch 2.13).
        loss_function: See `LossFunction`.
        settings: How to optimize.
        folder: Where state and log go; made when missing.
        trainable: The parameters to optimize; all by default.
        on_progress: Called after each logged step, on the main process.

    Raises:
        ConfigError: the batch does not divide by the number of processes.
        CheckpointError: the saved state belongs to other settings.
    """
    accelerator = Accelerator(cpu=not torch.cuda.is_available())
    share, rest = divmod(settings.batch_size, accelerator.num_processes)
    if rest:
        raise ConfigError(
            f"a batch of {settings.batch_size} does not divide by {accelerator.num_processes} "
            "processes",
            fix="choose a batch size that does.",
        )
    parameters = list(module.parameters() if trainable is None else trainable)
    optimizer = torch.optim.AdamW(parameters, weight_decay=settings.weight_decay)
    ema = EMAModel(parameters, decay=settings.ema_decay, use_ema_warmup=True, power=0.75)
    state = _State(folder, module, optimizer, ema, settings)
    first_step, elapsed = state.load()
    ema.to(accelerator.device)
    wrapped, optimizer = accelerator.prepare(module, optimizer)
    wrapped.train()
    started = time.monotonic() - elapsed
    recent: list[float] = []
    for step in range(first_step, settings.steps):
        start = step * settings.batch_size + accelerator.process_index * share
        with attention_kernel(accelerator.device), _autocast(accelerator.device, settings):
            loss = loss_function(wrapped, range(start, start + share))
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(parameters, settings.max_grad_norm)
        learning_rate = learning_rate_at(step, settings)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate
        optimizer.step()
        module.zero_grad(set_to_none=True)
        ema.step(parameters)
        recent = [*recent[1 - settings.log_every :], loss.item()]
        done = step + 1
        if accelerator.is_main_process:
            seconds = time.monotonic() - started
            if done % settings.log_every == 0 or done == settings.steps:
                mean = sum(recent) / len(recent)
                progress = Progress(done, settings.steps, mean, learning_rate, round(seconds, 1))
                state.log(progress)
                if on_progress is not None:
                    on_progress(progress)
            if done % settings.save_every == 0 or done == settings.steps:
                state.save(done, seconds)
    ema.copy_to(parameters)
    accelerator.wait_for_everyone()
    return TrainingResult(
        settings.steps,
        state.final_loss(),
        time.monotonic() - started,
        accelerator.num_processes,
        accelerator.is_main_process,
    )


def _autocast(device: torch.device, settings: TrainerSettings) -> torch.autocast:
    return torch.autocast(device.type, torch.bfloat16, enabled=settings.precision == "bf16")


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
        saved = torch.load(self.path, weights_only=True)
        if saved["settings"] != self.settings:
            raise CheckpointError(
                f"{self.path} was saved with other settings: {saved['settings']}, now "
                f"{self.settings}",
                fix="choose another run folder, or remove this one to start again.",
            )
        self.module.load_state_dict(saved["module"])
        self.optimizer.load_state_dict(saved["optimizer"])
        self.ema.load_state_dict(saved["ema"])
        return saved["step"], saved["seconds"]

    def save(self, step: int, seconds: float) -> None:
        temporary = self.path.with_suffix(f".{os.getpid()}.tmp")
        torch.save(
            {
                "step": step,
                "seconds": seconds,
                "settings": self.settings,
                "module": self.module.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "ema": self.ema.state_dict(),
            },
            temporary,
        )
        temporary.replace(self.path)

    def final_loss(self) -> float:
        """Mean of what was logged over the last tenth of the run."""
        lines = map(json.loads, (self.folder / "log.jsonl").read_text().splitlines())
        losses = [x["loss"] for x in lines if x["step"] > 0.9 * self.settings["steps"]]
        return sum(losses) / len(losses)

    def log(self, progress: Progress) -> None:
        with (self.folder / "log.jsonl").open("a") as stream:
            stream.write(json.dumps(asdict(progress)) + "\n")
