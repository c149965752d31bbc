"""Which step of a scheduler a denoiser's timestep means, and what is in force at each step.

Denoisers are told timesteps of the scheduler (often rounded to bfloat16), several of them at once
(one per token, frame or modality), or the noise level itself, as Cosmos' are.
"""

from __future__ import annotations

import warnings
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

import torch

from motionmerge.errors import ConfigError
from motionmerge.models.video_pipeline import Scheduler
from motionmerge.noise_levels import (
    counts_up,
    denoises_in_stages,
    level_of_step,
    noise_level,
    noisiest,
)
from motionmerge.schedule import ExpertSchedule, ScheduleEntry

_ROUNDING = 2.0**-8
"""A timestep that was cast to bfloat16 is off by no more than this share of itself."""


class UnusedExpertWarning(UserWarning):
    """An expert or knobs of a schedule get no step."""


@dataclass(frozen=True, kw_only=True)
class Moment:
    """One call of a denoiser: what is in force, and where in the denoising it is.

    Attributes:
        entry: What is in force.
        timestep: What the denoiser is told, of several the noisiest.
        x: Share of the steps done, 0 at the first step and 1 at the last.
        level: The noise level.
    """

    entry: ScheduleEntry
    timestep: float = 0.0
    x: float = 0.0
    level: float = 0.0


def conditions_of(schedule: ExpertSchedule) -> set[str]:
    """List what the schedule's entries look at: `above`, `timestep`, `step_fraction`."""
    return {entry.condition[0] for entry in schedule.entries if entry.condition}


def timesteps_of(scheduler: Scheduler | None) -> torch.Tensor | None:
    """Read the timesteps of a scheduler as numbers on the CPU; None if it has none yet."""
    steps = getattr(scheduler, "timesteps", None)
    if steps is None or not len(steps):
        return None
    return torch.as_tensor(steps).detach().cpu().double()


def check_conditions(schedule: ExpertSchedule, scheduler: Scheduler | None) -> None:
    """Refuse conditions that a scheduler would turn round.

    Raises:
        ConfigError: `timestep`, which is high where it is noisy, of a scheduler that counts up; or
            `step_fraction` of one that counts its steps anew at every resolution.
    """
    conditions, name = conditions_of(schedule), type(scheduler).__name__
    if "timestep" in conditions and counts_up(scheduler):
        raise ConfigError(
            f"The schedule has `timestep` conditions, which are for timesteps that fall, and those "
            f"of {name} rise from noise to clean.",
            fix="Write noise levels instead, e.g. `{expert: NAME, above: 0.64}`.",
        )
    if "step_fraction" in conditions and denoises_in_stages(scheduler):
        raise ConfigError(
            f"The schedule has `step_fraction` conditions, and {name} counts its steps anew at "
            "each of its resolutions.",
            fix="Write noise levels instead, e.g. `{expert: NAME, above: 0.64}`.",
        )


def entry_of_step(
    schedule: ExpertSchedule, scheduler: Scheduler | None, index: int
) -> ScheduleEntry:
    """Return what is in force at a step by its index.

    Raises:
        ConfigError: As `noise_level` and `check_conditions`.
    """
    check_conditions(schedule, scheduler)
    grid = timesteps_of(scheduler)
    assert grid is not None
    level = level_of_step(scheduler, index) if "above" in conditions_of(schedule) else 0.0
    calls = getattr(scheduler, "order", 1)
    return schedule.entry_at(
        noise_level=level,
        timestep=float(grid[index]),
        step_fraction=share_done(grid, index, calls=calls),
    )


def entry_of_timestep(
    schedule: ExpertSchedule, scheduler: Scheduler | None, timestep: float
) -> ScheduleEntry:
    """Return what is in force at a timestep that is none of the scheduler's steps.

    The share of the steps that are done is that of the nearest one.

    Raises:
        ConfigError: As `noise_level` and `check_conditions`.
    """
    check_conditions(schedule, scheduler)
    grid, fraction = timesteps_of(scheduler), 0.0
    if grid is not None:
        nearest = int((grid - timestep).abs().argmin())
        fraction = share_done(grid, nearest, calls=getattr(scheduler, "order", 1))
    level = noise_level(scheduler, timestep) if "above" in conditions_of(schedule) else 0.0
    return schedule.entry_at(noise_level=level, timestep=timestep, step_fraction=fraction)


def labels_of_steps(schedule: ExpertSchedule, scheduler: Scheduler | None) -> list[str]:
    """Describe what is in force at every call of the denoiser, once the timesteps are set.

    Raises:
        ConfigError: As `entry_of_step`.
    """
    return [
        entry_of_step(schedule, scheduler, index).label
        for index in range(len(getattr(scheduler, "timesteps", ())))
    ]


def describe_steps(labels: Sequence[str]) -> str:
    """Write what all steps have as one line: `steps 1-3 of 8: dynamics, 4-8: consistency`."""
    parts, first = [], 1
    for label, run in groupby(labels):
        last = first + len(list(run)) - 1
        of = f" of {len(labels)}" if first == 1 else ""
        parts.append(f"{first}{f'-{last}' if last > first else ''}{of}: {label}")
        first = last + 1
    return f"step{'s' if len(labels) > 1 else ''} {', '.join(parts)}"


def unused_entries(
    schedule: ExpertSchedule, scheduler: Scheduler | None, labels: Sequence[str]
) -> str | None:
    """Describe which entries of a schedule get no step, and why; None if all get some."""
    used = {entry.expert for entry in schedule.entries if entry.label in labels}
    unused = [
        f"`{label}`{' without knobs' if label in used else ''}"
        for label in schedule.labels
        if label not in labels
    ]
    if not unused:
        return None
    levels = ""
    if "above" in conditions_of(schedule):
        each = (level_of_step(scheduler, index) for index in range(len(labels)))
        levels = " of noise levels " + ", ".join(f"{level:.3g}" for level in each)
    return (
        f"With {type(scheduler).__name__} and its {len(labels)} "
        f"step{'s' if len(labels) > 1 else ''}{levels}, "
        f"{' and '.join(unused)} never denoise{'s' if len(unused) == 1 else ''}. "
        "Change the boundary, the number of steps or the shift, or write the schedule with "
        "`step_fraction`."
    )


def warn_of_unused(schedule: ExpertSchedule, scheduler: Scheduler | None) -> None:
    """Warn before denoising if an entry of the schedule gets no step."""
    message = unused_entries(schedule, scheduler, labels_of_steps(schedule, scheduler))
    if message is not None:
        warnings.warn(message, UnusedExpertWarning, stacklevel=2)


def place_of_step(scheduler: Scheduler | None, index: int | None, value: float) -> float:
    """Return x of a `Moment`: the index of the step, or of the nearest, over that of the last.

    Args:
        scheduler: With timesteps.
        index: Of the step; None if it is between steps.
        value: The timestep.
    """
    grid = timesteps_of(scheduler)
    assert grid is not None
    nearest = int((grid - value).abs().argmin()) if index is None else index
    done, total = _steps_done(grid, nearest, calls=getattr(scheduler, "order", 1))
    return done / max(total - 1, 1)


def start_step_of(schedule: ExpertSchedule, scheduler: Scheduler) -> int | None:
    """Return the start step that a schedule's `start` means; None for the whole denoising.

    Raises:
        ConfigError: No timestep has as little noise.
    """
    level = schedule.entries[0].start
    if level is None:
        return None
    total: int = scheduler.config["num_train_timesteps"]
    steps = bisect_right(range(total), level, key=lambda t: noise_level(scheduler, t))
    if steps == 0:
        raise ConfigError(
            f"The schedule begins at noise level {level:g}, and the least of "
            f"{type(scheduler).__name__} is {noise_level(scheduler, 0):.3g}.",
            fix="Write a larger `start`, such as 0.95.",
        )
    return None if steps == total else steps


def share_done(grid: torch.Tensor, index: int, *, calls: int) -> float:
    """Return the share of the steps that are done, see `_steps_done`."""
    done, total = _steps_done(grid, index, calls=calls)
    return done / total


def _steps_done(grid: torch.Tensor, index: int, *, calls: int) -> tuple[int, int]:
    """Count the steps before a call, and all; two calls at one timestep may be one step."""
    if calls == 1:
        return index, len(grid)
    starts = torch.cat([torch.ones(1, dtype=torch.bool), grid[1:] != grid[:-1]])
    return int(starts[: index + 1].sum()) - 1, int(starts.sum())


@dataclass
class StepFinder:
    """Finds the step that a denoiser's timestep means.

    Attributes:
        is_told_timesteps: A value was seen that can only be a timestep of the scheduler, so that
            others are as well.
    """

    is_told_timesteps: bool = False

    def find(self, scheduler: Scheduler | None, told: torch.Tensor) -> tuple[int | None, float]:
        """Find the step, None if it is between steps, and the timestep.

        The step that the scheduler is at counts if it may be: two steps may be one number once
        they are rounded, and a value of another modality may be noisier. Otherwise the nearest.

        Args:
            scheduler: With timesteps.
            told: What the denoiser is told, one number or several.

        Raises:
            ConfigError: It is told numbers from 0 to 1 that are neither timesteps nor noise levels.
        """
        grid = timesteps_of(scheduler)
        assert grid is not None
        values, value = told.detach().cpu().double().flatten(), noisiest(scheduler, told)
        current = getattr(scheduler, "step_index", None)
        if current is not None and current < len(grid) and _has(values, float(grid[current])):
            return current, float(grid[current])
        nearest = int((grid - value).abs().argmin())
        if value > 1:
            self.is_told_timesteps = True
        elif 0 < value <= 1 and float(grid.max()) > 2 and not self.is_told_timesteps:
            return self._told_level(scheduler, grid, values, value, nearest)
        is_step = _is_rounded(value, float(grid[nearest]))
        return (nearest, float(grid[nearest])) if is_step else (None, value)

    def _told_level(
        self,
        scheduler: Scheduler | None,
        grid: torch.Tensor,
        values: torch.Tensor,
        value: float,
        nearest: int,
    ) -> tuple[int | None, float]:
        """Find the step of a noise level, or of a timestep as a share of all of training's."""
        current = getattr(scheduler, "step_index", None)
        current = getattr(scheduler, "begin_index", None) if current is None else current
        index = current or 0
        config = getattr(scheduler, "config", None) or {}
        if index < len(grid) and hasattr(scheduler, "step_index"):
            likely = [float(grid[index]) / config.get("num_train_timesteps", 1000)]
            likely.append(level_of_step(scheduler, index))
            if any(_has(values, level) for level in likely):
                return index, float(grid[index])
        if _is_rounded(value, float(grid[nearest])):
            return nearest, float(grid[nearest])
        raise ConfigError(
            f"The denoiser is told {value:.4g}, and the timesteps of {type(scheduler).__name__} "
            f"are {float(grid[0]):.4g} to {float(grid[-1]):.4g}: its step is unknown.",
            fix="Attach the experts to the pipeline whose scheduler takes the steps, or tell the "
            "denoiser timesteps of `scheduler.timesteps`.",
        )


def _has(values: torch.Tensor, number: float) -> bool:
    """Check whether one of the values may be this number, cast to bfloat16."""
    return bool(((values - number).abs() <= _ROUNDING * values.abs()).any())


def _is_rounded(value: float, number: float) -> bool:
    return abs(number - value) <= _ROUNDING * abs(value)
