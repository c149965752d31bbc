"""What all banks share: which expert is due at a timestep, and who switches which module.

Paper: Tian et al. 2025, stage 3.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any, Protocol
from weakref import WeakKeyDictionary

import torch
from diffusers.models.attention_processor import Attention
from torch import nn

from motionmerge.errors import CheckpointError, ConfigError, RecipeError
from motionmerge.merge.sources import MODULES
from motionmerge.schedule import ExpertSchedule, noise_level
from motionmerge.text import fix_unknown_name

DENOISERS = ("unet", "transformer", "transformer_2")
BARE_MODULE = "denoiser"

_ROUNDING = 2.0**-8
"""A timestep that was cast to bfloat16 is off by no more than this share of itself."""


class Part(Protocol):
    """One module of a bank; `SwitchedModule` copies whole tensors, `AdaptedModule` scales LoRAs."""

    name: str
    module: nn.Module
    active: str | None

    @property
    def differs(self) -> bool: ...
    def attach(self) -> None: ...
    def activate(self, expert: str) -> None: ...
    def restore(self) -> None: ...


class Bank:
    """Experts attached to a model: before each call of a denoiser the right one is put in place.

    Use it as a context manager, or call `detach`: either way the model is as before, bit for bit.

    Attributes:
        schedule: Which expert denoises when.
        experts: The names of all experts.
        placement: Where what they need waits, in words; empty if nothing does.
    """

    placement: str = ""
    schedule: ExpertSchedule
    experts: tuple[str, ...]

    def __init__(
        self,
        target: Any,
        experts: Iterable[str],
        *,
        schedule: ExpertSchedule,
        scheduler: Any = None,
    ) -> None:
        self.schedule, self.experts = schedule, tuple(experts)
        self._target, self._scheduler = target, scheduler
        self._conditions = {entry.condition[0] for entry in schedule.entries if entry.condition}
        self._pinned: str | None = None
        self._parts: list[Any] = []
        self._hooks: list[Any] = []
        for name in schedule.experts:
            if name not in self.experts:
                raise RecipeError(
                    f"The schedule uses the expert `{name}`, which does not exist.",
                    fix=fix_unknown_name(name, self.experts),
                )

    def _attach(self, parts: Iterable[Part]) -> None:
        """Write to the modules and start switching; nothing stays behind if that fails."""
        self._parts = list(parts)
        try:
            for part in self._parts:
                _ATTACHED[part.module] = self
                part.attach()
                part.activate(self.schedule.experts[-1])
                if part.name in (*DENOISERS, BARE_MODULE):
                    self._hooks.append(self._watch(part.module, part.activate))
        except BaseException:
            self.detach()
            raise

    def __enter__(self) -> Bank:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.detach()

    def detach(self) -> None:
        """Give every module back as it was and stop switching. Harmless when repeated.

        Raises:
            CheckpointError: Some tensors have been taken out of a module; all others are back.
            OSError, RuntimeError: A module's own values could not be read or written; what is left
                is tried again when this is called again.
        """
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        faults: list[BaseException] = []
        kept: list[Any] = []
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

    def _give_back(self, part: Any, faults: list[BaseException]) -> bool:
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
        """Tell whether experts differ in a module such as `image_projector`."""
        return any(part.name == module_name and part.differs for part in self._parts)

    def expert_for(self, timestep: float | torch.Tensor) -> str:
        """Name the expert that denoises at a timestep (of several, at the largest).

        Pipelines cast timesteps to the model's dtype, so the nearest one of the scheduler counts,
        or of several that are as near the one that the scheduler is at.

        Raises:
            ConfigError: The schedule needs a noise level or a step, and there is no scheduler.
        """
        if self._pinned is not None:
            return self._pinned
        value = float(torch.as_tensor(timestep).detach().float().max())
        if not self._conditions:
            return self.schedule.experts[-1]
        scheduler = self._scheduler or getattr(self._target, "scheduler", None)
        steps = getattr(scheduler, "timesteps", None)
        level = fraction = 0.0
        if steps is not None and len(steps):
            grid = torch.as_tensor(steps).detach().cpu().double()
            index, is_timestep = self._step(value, grid, scheduler)
            fraction = _share_done(grid, index, calls=getattr(scheduler, "order", 1))
            if not is_timestep or _is_rounded(value, float(grid[index])):
                value = float(grid[index])
        elif "step_fraction" in self._conditions:
            raise _no_scheduler()
        if "above" in self._conditions:
            if scheduler is None:
                raise _no_scheduler()
            level = noise_level(scheduler, value)
        return self.schedule.expert_at(noise_level=level, timestep=value, step_fraction=fraction)

    def _step(self, value: float, grid: torch.Tensor, scheduler: Any) -> tuple[int, bool]:
        """Find the step that a timestep means, and whether it is a timestep of the scheduler's.

        That is the step that the scheduler is at, if it may be; otherwise the nearest. A number
        below 1 where all timesteps are above is something else, as what Cosmos tells its denoiser:
        a pipeline's scheduler knows the step, and has no index before the first.
        """
        index = getattr(scheduler, "step_index", None)
        if index is not None and index < len(grid) and _is_rounded(value, float(grid[index])):
            return index, True
        is_stepped = hasattr(scheduler, "step_index") and not isinstance(self._target, nn.Module)
        if is_stepped and value < 1 < float(grid.min()) and (index or 0) < len(grid):
            return index or 0, False
        return int((grid - value).abs().argmin()), True

    def put_in_place(self, expert: str) -> None:
        """Give the denoisers an expert, as calls of them do, for who computes without calls."""
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
                fix="use them inside their `with experts(...)` block.",
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

    def _watch(self, module: nn.Module, activate: Callable[[str], None]) -> Any:
        """Call `activate` with the expert that is due before every call of a denoiser."""
        original = getattr(module, "_orig_mod", module)
        signature = inspect.signature(type(original).forward)
        if "timestep" not in signature.parameters:
            raise ConfigError(
                f"{type(original).__name__}.forward takes no `timestep`.",
                fix="attach experts to the denoiser of a diffusers pipeline.",
            )

        def before_denoising(called: nn.Module, args: tuple[Any, ...], kwargs: Any) -> None:
            if called is not module:  # a copy of it, which took the hook along
                return
            arguments = signature.bind_partial(called, *args, **kwargs).arguments
            activate(self.expert_for(arguments["timestep"]))

        compiled = getattr(module, "_compiled_call_impl", None) is not None
        hook = torch.compiler.disable(before_denoising) if compiled else before_denoising
        return module.register_forward_pre_hook(hook, with_kwargs=True)


_ATTACHED: WeakKeyDictionary[nn.Module, Bank] = WeakKeyDictionary()


def attached_bank(module: nn.Module) -> Bank | None:
    """Give the bank that switches this module now, or None."""
    return _ATTACHED.get(module)


def modules_of(target: Any, *, only: str | None = None) -> list[tuple[str, nn.Module]]:
    """List the modules of a pipeline that experts can switch, denoisers first.

    Args:
        target: A pipeline, or one module.
        only: Just this one of the pipeline.

    Raises:
        ConfigError: There is no denoiser, `only` is none, or experts would not reach all denoisers.
    """
    if isinstance(target, nn.Module):
        return [(BARE_MODULE, target)]
    if hasattr(target, "null_component_names"):  # a modular one; its class is slow to import
        _check_loaded(target, only)
    found = [(name, getattr(target, name, None)) for name in MODULES]
    modules = [(name, module) for name, module in found if isinstance(module, nn.Module)]
    if not any(name in DENOISERS for name, _ in modules):
        raise ConfigError(
            f"{type(target).__name__} has no `unet` or `transformer`.",
            fix="pass a loaded diffusers video pipeline, or the denoiser itself.",
        )
    if only is None:
        return modules
    if only not in DENOISERS and only in dict(modules):
        raise ConfigError(
            f"`{only}` alone cannot be switched: it sees no timestep.",
            fix=f"leave `module` out and name its tensors `{only}.<name>`.",
        )
    if only not in dict(modules):
        raise ConfigError(
            f"{type(target).__name__} has no module `{only}`.",
            fix=fix_unknown_name(only, dict(modules)),
        )
    return [(only, dict(modules)[only])]


def _check_loaded(pipeline: Any, only: str | None) -> None:
    """Refuse a modular pipeline that would denoise with weights which no expert reaches.

    It is made without weights, and loads them later, in any order.

    Raises:
        ConfigError: A denoiser is not loaded yet, or is none of those that experts can switch.
    """
    wanted = DENOISERS if only is None else (only,)
    parts = pipeline.components
    kind = type(pipeline).__name__
    absent = [name for name in wanted if name in parts and parts[name] is None]
    if absent:
        raise ConfigError(
            f"`{absent[0]}` of {kind} is not loaded yet, so no expert can be put in its place.",
            fix="call load_components() or update_components(...) of the pipeline before.",
        )
    others = [
        name
        for name, part in parts.items()
        if name.startswith("transformer_") and name not in DENOISERS and part is not None
    ]
    if others and only is None:
        raise ConfigError(
            f"{kind} has `{others[0]}` loaded as well, which experts do not reach.",
            fix="choose the denoiser to switch, e.g. module='transformer', or make the pipeline "
            "with the one workflow that you use (workflow=...).",
        )


def check_attachable(name: str, module: nn.Module) -> None:
    """Refuse a module that is switched already, or where what is written would have no effect.

    Raises:
        ConfigError: Such a module.
    """
    check_unfused(name, module)
    if attached_bank(module) is not None:
        raise ConfigError(
            f"`{name}` already has experts attached.",
            fix="leave the other `with experts(...)` block first.",
        )
    if any(hook.group.stream is not None for hook in group_offload_hooks(module)):
        raise ConfigError(
            f"`{name}` is offloaded with streams, which drop what is written to it.",
            fix="call enable_group_offload(..., use_stream=False).",
        )


def check_unfused(name: str, module: nn.Module) -> None:
    """Refuse a module that computes with copies of its weights, which a switch does not reach.

    Raises:
        ConfigError: Its attention has fused projections.
    """
    if is_fused(module):
        raise ConfigError(
            f"`{name}` computes with fused projections, which hold copies of its weights.",
            fix="call unfuse_qkv_projections() before attaching experts; fusing saves little.",
        )


def is_fused(module: nn.Module) -> bool:
    """Tell whether attention computes queries, keys and values by one product."""
    fused = [child for child in module.modules() if getattr(child, "fused_projections", False)]
    # The older kind of attention stays marked when it is unfused: its processor tells.
    return any(
        not isinstance(child, Attention) or "Fused" in type(child.processor).__name__
        for child in fused
    )


def group_offload_hooks(module: nn.Module) -> list[Any]:
    """List the hooks by which diffusers offloads parts of a module in groups."""
    registries = (getattr(child, "_diffusers_hook", None) for child in module.modules())
    hooks = (registry.get_hook("group_offloading") for registry in registries if registry)
    return [hook for hook in hooks if hook is not None]


def _is_rounded(value: float, timestep: float) -> bool:
    """Tell whether a value may be a timestep that was cast to bfloat16."""
    return abs(timestep - value) <= _ROUNDING * abs(value)


def _share_done(grid: torch.Tensor, index: int, *, calls: int) -> float:
    """Give the share of the steps that are done; two calls at one timestep may be one step."""
    if calls == 1:
        return index / len(grid)
    starts = torch.cat([torch.ones(1, dtype=torch.bool), grid[1:] != grid[:-1]])
    return (int(starts[: index + 1].sum()) - 1) / int(starts.sum())


def _no_scheduler() -> ConfigError:
    return ConfigError(
        "The schedule needs the noise level of a timestep, which needs a scheduler.",
        fix="pass scheduler=..., or write the schedule with `timestep:` conditions.",
    )
