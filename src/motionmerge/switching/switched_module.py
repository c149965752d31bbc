"""One module whose weights are switched: what differs between experts, and its own values.

Part of the expert bank. Values are fitted to the module once and compared bit for bit, so that a
switch copies only what has to change and restoring gives back exactly what was there.
"""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Iterable, Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from motionmerge.errors import CheckpointError, ConfigError, ShapeError
from motionmerge.memory import return_freed_memory
from motionmerge.models.diffusers_state import computing_device, is_fused, reset_caches
from motionmerge.switching.bank import check_unfused
from motionmerge.switching.on_disk import TensorsOnDisk
from motionmerge.switching.placement import (
    ExpertPlacement,
    Weights,
    choose_placement,
    free_or_none,
)
from motionmerge.switching.prefetch import Prefetcher, lane_to
from motionmerge.switching.recompute import RecomputedExpert

_GROUP_BYTES = {"cpu": 4 << 20, "cuda": 64 << 20}
"""How much is copied by one call. Other devices take tensors one by one."""

_COPIED_TOGETHER = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
"""Dtypes of which one call copies many tensors; not every version of torch takes fp8."""


@dataclass(kw_only=True)
class SwitchedModule:
    """One module of a bank.

    Attributes:
        name: Its name in the pipeline, e.g. `unet`.
        module: The module itself.
        values: For each expert, the tensors in which experts differ. Of a resident expert those
            that are in place are not held a second time. Those that are prefetched are elsewhere.
        shared: Tensors in which all experts agree, but not with the module.
        keeps_own: Whether the module gets its own values back.
        backup: The module's own values of all these tensors, on disk if experts are recomputed;
            empty if it does not get them back.
        active: The expert whose values are in place.
        placement: Where the values wait.
        differs: Whether experts differ here.
    """

    name: str
    module: nn.Module
    keeps_own: bool = True
    values: dict[str, MutableMapping[str, torch.Tensor]] = field(default_factory=dict)
    shared: Weights = field(default_factory=dict)
    backup: dict[str, torch.Tensor] | TensorsOnDisk = field(default_factory=dict)
    active: str | None = None
    placement: ExpertPlacement | None = None
    differs: bool = False
    _in_place: dict[str, str] = field(default_factory=dict)
    _prefetcher: Prefetcher | None = None

    def tensors(self) -> dict[str, torch.Tensor]:
        """Return the live parameters and buffers; looked up anew, as `.to()` replaces buffers."""
        state = self.module.state_dict(keep_vars=True)
        return {name.replace("_orig_mod.", ""): tensor for name, tensor in state.items()}

    def fit(self, per_expert: Mapping[str, Weights]) -> None:
        """Sort the experts' tensors into unchanged, shared and different ones.

        Args:
            per_expert: For every expert its tensors of this module; for one that an expert lacks it
                uses the module's own.

        Raises:
            ShapeError: A tensor has another shape than the module's.
            CheckpointError: A tensor that changes is quantised, packed or sharded in the module, or
                has two names there.
            ConfigError: The module's tensor is on the meta device.
        """
        live = self.tensors()
        if any(_is_recomputed(tensors) for tensors in per_expert.values()):
            self.backup = TensorsOnDisk()
        shared: list[str] = []
        different: list[str] = []
        fitted: dict[str, dict[str, torch.Tensor]] = {expert: {} for expert in per_expert}
        places: dict[tuple[int, torch.Size], str] = {}
        for name in dict.fromkeys(name for tensors in per_expert.values() for name in tensors):
            own, label = live[name].detach(), f"{self.name}.{name}"
            values = {
                expert: _fitted(tensors[name], own, label=label, expert=expert)
                for expert, tensors in per_expert.items()
                if name in tensors
            }
            if all(_same_bits(value, own) for value in values.values()):
                continue
            _check_writable(live[name], label=label)
            twin = places.setdefault((own.data_ptr(), own.shape), name)
            if twin != name and own.numel():
                raise CheckpointError(
                    f"`{label}` and `{self.name}.{twin}` are one tensor in the model.",
                    fix="Leave one of the two names out.",
                )
            if self.keeps_own:
                self.backup[name] = own.to("cpu", copy=True)
            if len(values) < len(per_expert):
                values = dict.fromkeys(per_expert, own.to("cpu", copy=True)) | values
            first = next(iter(values.values()))
            is_shared = all(_same_bits(value, first) for value in values.values())
            (shared if is_shared else different).append(name)
            for expert, value in values.items():
                is_kept = name not in per_expert[expert] or not _is_recomputed(per_expert[expert])
                if is_kept and not (is_shared and value is not first):
                    fitted[expert][name] = value
        first_expert = next(iter(per_expert))
        self.shared = _some(shared, fitted[first_expert], per_expert[first_expert])
        self.values = {
            expert: _some(different, fitted[expert], tensors)
            for expert, tensors in per_expert.items()
        }
        self.differs = bool(different)
        return_freed_memory()

    def place(self, placement: str, order: Iterable[str]) -> None:
        """Move the values that are kept to where they wait.

        Args:
            placement: One of `PLACEMENTS`.
            order: The experts as they follow one another in a video, to send the next one ahead.
        """
        recomputed = [v for v in self.values.values() if not isinstance(v, dict)]
        device = computing_device(self.module)
        if recomputed:
            reason = f"{len(self.values)} experts, computed at every switch"
            self.placement = ExpertPlacement("recompute", device, reason=reason)
            return
        sizes = {e: sum(v.nbytes for v in own.values()) for e, own in self.values.items()}
        self.placement = choose_placement(
            placement, expert_bytes=sizes, device=device, free=free_or_none(device)
        )
        order = list(order)
        if self.placement.kind == "prefetch":
            self._prefetcher = Prefetcher(
                self.values,
                order=order,
                lane=lane_to(device),
                max_bytes=self.placement.ahead_bytes,
            )
        elif device.type != "cpu":
            for expert, own in self.values.items():
                if expert != order[-1]:  # which is in place first, and held after others are
                    own.update({name: value.to(device) for name, value in own.items()})

    @torch.no_grad()
    def copy(self, values: Weights) -> None:
        """Copy values over the module's tensors, in place.

        Raises:
            CheckpointError: The module has lost one of these tensors since `fit`.
        """
        self._write(self.tensors(), values, list(values))

    def _write(self, live: Weights, values: Weights, names: Iterable[str]) -> None:
        for group in _groups(values, names):
            _copy_all([self._tensor(live, name) for name in group], list(group.values()))

    @torch.no_grad()
    def exchange(self, expert: str) -> None:
        """Copy an expert's values in and keep the values that were there before.

        Whenever this stops, each expert's value of each tensor is in place or held.

        Raises:
            CheckpointError: As `copy`.
        """
        live = self.tensors()
        held = self.values[expert]
        for group in _groups(held, list(held)):
            own = {name: self._tensor(live, name) for name in group}
            leaving = [name for name in group if self._is_only_in_place(name)]
            copies = [torch.empty_like(group[name]) for name in leaving]
            _copy_all(copies, [own[name] for name in leaving])
            for name, copy in zip(leaving, copies, strict=True):
                self.values[self._in_place[name]][name] = copy
            _copy_all(list(own.values()), list(group.values()))
            for name in group:
                self._in_place[name] = expert
                del held[name]

    def _is_only_in_place(self, name: str) -> bool:
        """Return whether an expert's value would be lost if another were written over it."""
        expert = self._in_place.get(name)
        return expert is not None and name not in self.values[expert]

    def _tensor(self, live: Weights, name: str) -> torch.Tensor:
        if name not in live:
            raise CheckpointError(
                f"`{self.name}` lost its tensor `{name}` while experts were attached.",
                fix="Load LoRA adapters and quantise before attaching experts.",
            )
        return live[name]

    def attach(self) -> None:
        """Copy in what all experts share."""
        self.copy(self.shared)

    def activate(self, expert: str) -> None:
        """Copy an expert's values in, unless they are there, and clear the module's caches."""
        if expert == self.active:
            return
        check_unfused(self.name, self.module)
        self.active = None  # a copy that fails half-way must be done again
        kind = self.placement.kind if self.placement else ""
        if self._prefetcher is not None:
            self.copy(self._prefetcher.take(expert))
        elif kind == "resident":
            self.exchange(expert)
        else:
            self.copy(self.values[expert])
        if kind == "recompute":
            return_freed_memory()
        reset_caches(self.module)
        self.active = expert
        if self._prefetcher is not None:
            self._prefetcher.send_next(expert)

    @torch.no_grad()
    def restore(self) -> None:
        """Restore the module's own values, bit for bit, and hold nothing any more.

        Raises:
            CheckpointError: The module has lost some of these tensors; it gets all others back.
        """
        live = self.tensors()
        for name in list(live):  # LoRAs that were loaded meanwhile have wrapped layers
            live.setdefault(name.replace(".base_layer.", "."), live[name])
        lost = [name for name in self.backup if name not in live]
        self._write(live, self.backup, [name for name in self.backup if name in live])
        if is_fused(self.module):  # meanwhile, from an expert's weights
            module: Any = self.module
            module.unfuse_qkv_projections()
            module.fuse_qkv_projections()
        reset_caches(self.module)
        self.active = self._prefetcher = None
        self.values, self.shared, self.backup = {}, {}, {}
        if lost:
            self._tensor(live, lost[0])


def _groups(values: Weights, names: Iterable[str]) -> Iterator[dict[str, torch.Tensor]]:
    """Ask for tensors one by one, and give neighbours of one device together, some MB at a time."""
    group: dict[str, torch.Tensor] = {}
    left = 0
    for name in names:
        value = values[name]
        left -= value.nbytes
        if group and (left < 0 or value.device != next(iter(group.values())).device):
            yield group
            group = {}
        if not group:
            left = _GROUP_BYTES.get(value.device.type, 0) - value.nbytes
        group[name] = value
    if group:
        yield group


def _copy_all(targets: Sequence[torch.Tensor], sources: Sequence[torch.Tensor]) -> None:
    """Copy tensors over others; those of a GPU by one call, and without waiting for it.

    What goes to main memory is waited for: it could be used there before it has arrived.
    """
    if targets and all(target.dtype in _COPIED_TOGETHER for target in targets):
        on_gpu = all(target.is_cuda for target in targets)
        torch._foreach_copy_(list(targets), list(sources), non_blocking=on_gpu)
        return
    for target, source in zip(targets, sources, strict=True):
        target.copy_(source)


def _is_recomputed(weights: Weights) -> bool:
    return isinstance(weights, RecomputedExpert)


def _some(
    names: list[str], kept: dict[str, torch.Tensor], tensors: Weights
) -> MutableMapping[str, torch.Tensor]:
    """Select tensors by name: those in memory first, the rest recomputed on demand."""
    own = {name: kept[name] for name in names if name in kept}
    if not isinstance(tensors, RecomputedExpert):
        return own
    computed = tensors.only(name for name in names if name not in own)
    return ChainMap(own, computed)  # type: ignore[arg-type]  # it writes to its first map alone


def _fitted(value: torch.Tensor, own: torch.Tensor, *, label: str, expert: str) -> torch.Tensor:
    """Round a tensor to the module's dtype; clone it if it is the module's own storage."""
    if not _is_plain(own) or not own.is_floating_point():
        return value.detach()
    check_shape(value.shape, own.shape, label=label, expert=expert)
    value = value.detach().to(own.dtype)
    aliased = value.untyped_storage().data_ptr() == own.untyped_storage().data_ptr()
    return value.clone() if aliased and not own.is_meta else value


def check_shape(shape: torch.Size, own: torch.Size, *, label: str, expert: str) -> None:
    """Refuse an expert's tensor that does not fit the module's.

    Raises:
        ShapeError: It has another shape.
    """
    if shape != own:
        raise ShapeError(
            f"`{label}` of the expert `{expert}` has shape {list(shape)}; the model's has "
            f"{list(own)}.",
            fix="Use weights of the same architecture and configuration.",
        )


def _same_bits(left: torch.Tensor, right: torch.Tensor) -> bool:
    """Return whether two tensors are equal bit for bit (NaN equals itself, 0 differs from -0)."""
    if left.dtype != right.dtype or left.shape != right.shape or right.is_meta:
        return False
    if any(hasattr(tensor, "__tensor_flatten__") for tensor in (left, right)):
        return False  # made of several tensors, as torchao packs weights
    raw = [
        tensor.contiguous().reshape(-1).view(torch.uint8)
        for tensor in (left.to(right.device), right)
    ]
    return torch.equal(*raw)


def _is_plain(tensor: torch.Tensor) -> bool:
    return type(tensor) in (torch.Tensor, nn.Parameter) and type(tensor.data) is torch.Tensor


def _check_writable(tensor: torch.Tensor, *, label: str) -> None:
    if tensor.is_meta:
        raise ConfigError(
            f"`{label}` is on the meta device: its values are elsewhere.",
            fix="Use enable_model_cpu_offload() or group offload instead of sequential offload.",
        )
    if not _is_plain(tensor) or not tensor.is_floating_point():
        raise CheckpointError(
            f"`{label}` is a {type(tensor).__name__} of {tensor.dtype}: quantised, packed or "
            "sharded, so exact weights cannot be copied into it.",
            fix="Load the model in bf16, fp16 or fp32, or merge to two checkpoints and use a "
            "pipeline with transformer and transformer_2.",
        )
