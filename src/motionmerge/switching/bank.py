"""What all banks share: what is due at a timestep, and who switches which module.

Paper: Tian et al. 2025, stage 3.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Protocol
from weakref import WeakKeyDictionary

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from motionmerge.errors import CheckpointError, ConfigError, RecipeError
from motionmerge.knobs import NoisyImage
from motionmerge.merging.names.wrappers import DENOISERS
from motionmerge.models.diffusers_state import group_offload_hooks, is_fused, waits_in_files
from motionmerge.models.video_pipeline import Scheduler, VideoPipeline
from motionmerge.noise_levels import denoises_in_stages, noise_level, noisiest
from motionmerge.schedule import ExpertSchedule, ScheduleEntry
from motionmerge.switching.denoiser_call import DenoiserCalls
from motionmerge.switching.denoising_steps import (
    Moment,
    StepFinder,
    conditions_of,
    entry_of_step,
    entry_of_timestep,
    place_of_step,
    timesteps_of,
    warn_of_unused,
)
from motionmerge.switching.switchable import BARE_MODULE, modules_of
from motionmerge.switching.watched_call import WatchedCall
from motionmerge.text import fix_unknown_name

_TIMESTEPS = ("timestep", "vision_timesteps")
"""Names of the denoisers' timesteps; Cosmos 3 has one set for each modality."""


class SwitchedPart(Protocol):
    """One module of a bank; `SwitchedModule` copies whole tensors, `AdaptedModule` scales LoRAs."""

    name: str
    module: nn.Module
    active: str | None

    @property
    def differs(self) -> bool: ...
    def attach(self) -> None: ...
    def activate(self, expert: str) -> None: ...
    def restore(self) -> None: ...


@dataclass
class UnchangedModule:
    """A denoiser in which all experts are the same: its own weights."""

    name: str
    module: nn.Module
    active: str | None = None
    differs: bool = False

    def attach(self) -> None:
        pass

    def activate(self, expert: str) -> None:
        self.active = expert

    def restore(self) -> None:
        self.active = None


class Bank:
    """Experts attached to a model: before each call of a denoiser the right one is put in place.

    Use it as a context manager, or call `detach`: either way the model is as before, bit for bit.

    Attributes:
        schedule: What is in force when.
        experts: The names of all experts.
        placement: Where what they need waits, in words; empty if nothing does.
    """

    placement: str = ""
    schedule: ExpertSchedule
    experts: tuple[str, ...]

    def __init__(
        self,
        target: VideoPipeline | nn.Module,
        experts: Iterable[str],
        *,
        schedule: ExpertSchedule,
        scheduler: Scheduler | None = None,
    ) -> None:
        self.schedule, self.experts = schedule, tuple(experts)
        self._target, self._scheduler = target, scheduler
        self._conditions = conditions_of(schedule)
        self._finder = StepFinder()
        self._grid: torch.Tensor | None = None
        self._pinned: str | None = None
        self._calls = DenoiserCalls.of(target, schedule) if schedule.has_knobs else None
        self._parts: list[SwitchedPart] = []
        self._hooks: list[RemovableHandle | WatchedCall] = []
        for name in schedule.experts:
            if name not in self.experts:
                raise RecipeError(
                    f"The schedule uses the expert `{name}`, which does not exist.",
                    fix=fix_unknown_name(name, self.experts),
                )

    @classmethod
    def of_model(
        cls,
        target: VideoPipeline | nn.Module,
        experts: Iterable[str],
        *,
        schedule: ExpertSchedule,
        scheduler: Scheduler | None = None,
        module: str | None = None,
    ) -> Bank:
        """Attach knobs alone: every expert is the model as it is."""
        bank = cls(target, experts, schedule=schedule, scheduler=scheduler)
        bank._attach(bank._unchanged(module, ()), module)
        return bank

    def _unchanged(self, only: str | None, parts: Iterable[SwitchedPart]) -> list[UnchangedModule]:
        """List the denoisers in which no expert differs, and which knobs act on all the same.

        Raises:
            ConfigError: One of them has experts already.
        """
        taken = [part.module for part in parts]
        found = []
        for name, module in modules_of(self._target, only=only):
            if name in (*DENOISERS, BARE_MODULE) and not any(module is one for one in taken):
                check_free(name, module)
                found.append(UnchangedModule(name, module))
        return found

    def _attach(self, parts: Iterable[SwitchedPart], only: str | None) -> None:
        """Write to the modules and start switching; nothing stays behind if that fails.

        Args:
            parts: The modules in which experts differ.
            only: The only module that is meant.
        """
        self._parts = list(parts)
        if self._calls is not None:
            self._parts += self._unchanged(only, self._parts)
        try:
            for part in self._parts:
                _ATTACHED[part.module] = self
                part.attach()
                part.activate(self.schedule.experts[-1])
                if part.name in (*DENOISERS, BARE_MODULE):
                    self._hooks.append(self._watch(part))
        except BaseException:
            self.detach()
            raise

    def __enter__(self) -> Bank:
        return self

    def __exit__(self, fault: object, *_: object) -> None:
        self.detach()
        if self._calls is not None and fault is None:
            self._calls.check_finished()

    def detach(self) -> None:
        """Restore every module and stop switching. Harmless when repeated.

        Raises:
            CheckpointError: Some tensors have been taken out of a module; all others are back.
            OSError, RuntimeError: A module's own values could not be read or written; what is left
                is tried again when this is called again.
        """
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        faults: list[BaseException] = []
        kept: list[SwitchedPart] = []
        try:
            while self._parts:
                part = self._parts[0]
                if _ATTACHED.get(part.module) is self and self._give_back(part, faults):
                    del _ATTACHED[part.module]
                elif _ATTACHED.get(part.module) is self:
                    kept.append(part)
                self._parts = self._parts[1:]
        finally:
            self._parts = kept + self._parts
        if faults:
            raise faults[0]

    def _give_back(self, part: SwitchedPart, faults: list[BaseException]) -> bool:
        """Restore one module; tell whether it is done, or could be tried again."""
        try:
            try:
                part.restore()
            except KeyboardInterrupt as fault:  # half of a model is none
                faults.append(fault)
                part.restore()
        except CheckpointError as fault:  # tensors are gone; all others are back
            faults.append(fault)
        except (OSError, RuntimeError, ValueError, AttributeError) as fault:
            faults.append(fault)
            return False
        return True

    def switches(self, module_name: str) -> bool:
        """Return whether experts differ in a module such as `image_projector`."""
        return any(part.name == module_name and part.differs for part in self._parts)

    def check_pipeline(self, pipeline: object) -> None:
        """Refuse knobs in a run of another pipeline than that they were attached to.

        Raises:
            ConfigError: There are knobs, and it is another.
        """
        if self._calls is not None:
            self._calls.check_pipeline(pipeline)

    def expert_for(self, timestep: float | torch.Tensor) -> str:
        """Name the expert that denoises at a timestep; see `moment_for`."""
        return self.moment_for(timestep).entry.expert

    def moment_for(self, timestep: float | torch.Tensor) -> Moment:
        """Return what is in force at a timestep (of several, at the noisiest).

        Pipelines cast timesteps to the model's dtype, so the nearest one of the scheduler counts,
        or of several that are as near the one that the scheduler is at.

        Raises:
            ConfigError: The schedule needs a noise level or a step, and there is no scheduler, or
                as `StepFinder.find` and `noise_level`.
        """
        has_knobs = self.schedule.has_knobs
        if self._pinned is not None and not has_knobs:
            return Moment(entry=ScheduleEntry(self._pinned))
        told = torch.as_tensor(timestep).detach()
        if not self._conditions and not has_knobs:
            return Moment(entry=self.schedule.entries[-1])
        scheduler = self._scheduler or getattr(self._target, "scheduler", None)
        if scheduler is None and (self._conditions != {"timestep"} or has_knobs):
            raise _no_scheduler()
        if timesteps_of(scheduler) is None:
            if "step_fraction" in self._conditions or has_knobs:
                raise _no_scheduler()
            entry = entry_of_timestep(self.schedule, scheduler, noisiest(scheduler, told))
            return Moment(entry=self._with_pinned(entry))
        self._look_at_steps(scheduler)
        index, value = self._finder.find(scheduler, told)
        if index is None:
            entry = entry_of_timestep(self.schedule, scheduler, value)
        else:
            entry = entry_of_step(self.schedule, scheduler, index)
        entry = self._with_pinned(entry)
        if not entry.knobs:
            return Moment(entry=entry, timestep=value)
        place = place_of_step(scheduler, index, value)
        is_noised = any(isinstance(knob, NoisyImage) for knob in entry.image)
        level = noise_level(scheduler, value) if is_noised else 0.0
        return Moment(entry=entry, timestep=value, x=place, level=level)

    def _with_pinned(self, entry: ScheduleEntry) -> ScheduleEntry:
        """Replace an entry's expert by the one that is used whatever the timestep."""
        return entry if self._pinned is None else replace(entry, expert=self._pinned)

    def _look_at_steps(self, scheduler: Scheduler | None) -> None:
        """Warn once of steps that leave an expert out, before the first of them is taken."""
        grid = timesteps_of(scheduler)
        is_set = getattr(scheduler, "num_inference_steps", None) is not None
        if grid is None or not is_set or denoises_in_stages(scheduler):
            return
        if self._grid is None or not torch.equal(grid, self._grid):
            self._grid = grid
            warn_of_unused(self.schedule, scheduler)

    def put_in_place(self, expert: str) -> None:
        """Activate an expert on every denoiser, for code without forward hooks (CUDA graphs)."""
        for part in self._parts:
            if part.name in (*DENOISERS, BARE_MODULE):
                part.activate(expert)

    @contextmanager
    def with_expert(self, name: str, *, modules: Iterable[str] | None = None) -> Iterator[None]:
        """Use one expert inside the block, whatever the timestep.

        Args:
            name: The expert.
            modules: Only switch these, e.g. `["image_projector"]`; by default all, and the
                denoisers then keep this expert for every timestep.

        Raises:
            RecipeError: There is no such expert.
            ConfigError: The bank is not attached any more.
        """
        if name not in self.experts:
            raise RecipeError(
                f"There is no expert `{name}`.", fix=fix_unknown_name(name, self.experts)
            )
        if not self._parts:
            raise ConfigError(
                "These experts are not attached any more.",
                fix="Use them inside their `with experts(...)` block.",
            )
        parts = [part for part in self._parts if modules is None or part.name in set(modules)]
        before = [part.active or self.schedule.experts[-1] for part in parts]
        pinned, self._pinned = self._pinned, name if modules is None else self._pinned
        try:
            for part in parts:
                part.activate(name)
            yield
        finally:
            self._pinned = pinned
            for part, expert in zip(parts, before, strict=True):
                if _ATTACHED.get(part.module) is self:
                    part.activate(expert)

    def _watch(self, part: SwitchedPart) -> RemovableHandle | WatchedCall:
        """Activate the expert that is due before every call of a denoiser, and turn its knobs."""
        module = part.module
        original = getattr(module, "_orig_mod", module)
        signature = inspect.signature(type(original).forward)
        name = next((name for name in _TIMESTEPS if name in signature.parameters), None)
        if name is None:
            raise ConfigError(
                f"{type(original).__name__}.forward takes no `timestep`.",
                fix="Attach experts to the denoiser of a diffusers pipeline.",
            )

        def due(arguments: Mapping[str, Any]) -> Moment:
            moment = self.moment_for(arguments[name])
            part.activate(moment.entry.expert)
            return moment

        if self._calls is not None and self._calls.family.passes != "own":
            return self._calls.watch(part.name, module, signature=signature, before=due)

        def before_denoising(
            called: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]
        ) -> None:
            if called is not module:  # a copy of it, which took the hook along
                return
            due(signature.bind_partial(called, *args, **kwargs).arguments)

        compiled = getattr(module, "_compiled_call_impl", None) is not None
        hook = before_denoising
        if compiled:
            hook = torch.compiler.disable(hook)  # type: ignore[no-untyped-call]  # torch's own
        return module.register_forward_pre_hook(hook, with_kwargs=True)


_ATTACHED: WeakKeyDictionary[nn.Module, Bank] = WeakKeyDictionary()


def attached_bank(module: nn.Module) -> Bank | None:
    """Return the bank that switches this module now, or None."""
    return _ATTACHED.get(module)


def check_attachable(name: str, module: nn.Module) -> None:
    """Refuse a module that is switched already, or where what is written would have no effect.

    Raises:
        ConfigError: Such a module.
    """
    check_unfused(name, module)
    check_free(name, module)
    if any(hook.group.stream is not None for hook in group_offload_hooks(module)):
        raise ConfigError(
            f"`{name}` is offloaded with streams, which drop what is written to it.",
            fix="Call enable_group_offload(..., use_stream=False).",
        )
    if waits_in_files(module):
        raise ConfigError(
            f"The weights of `{name}` wait in files (group offload), which no expert reaches.",
            fix="Call enable_group_offload() without `offload_to_disk_path`.",
        )


def check_free(name: str, module: nn.Module) -> None:
    """Refuse a module that is switched already.

    Raises:
        ConfigError: Such a module.
    """
    if attached_bank(module) is not None:
        raise ConfigError(
            f"`{name}` already has experts attached.",
            fix="Leave the other `with experts(...)` block first.",
        )


def check_unfused(name: str, module: nn.Module) -> None:
    """Refuse a module that computes with copies of its weights, which a switch does not reach.

    Raises:
        ConfigError: Its attention has fused projections.
    """
    if is_fused(module):
        raise ConfigError(
            f"`{name}` computes with fused projections, which hold copies of its weights.",
            fix="Call unfuse_qkv_projections() before attaching experts; fusing saves little.",
        )


def _no_scheduler() -> ConfigError:
    return ConfigError(
        "The schedule needs the noise level of a timestep, which needs a scheduler.",
        fix="Pass scheduler=..., or write the schedule with `timestep:` conditions.",
    )
