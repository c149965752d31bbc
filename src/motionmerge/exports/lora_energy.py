"""How much of a change a LoRA holds: squared singular values, added up by parameter group."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field

from motionmerge.exports.lora_factors import Factors
from motionmerge.lazy_torch import torch
from motionmerge.parameter_groups import GROUPS, OTHER, group_of


@dataclass(frozen=True, kw_only=True)
class Energy:
    """The share of a group's change that a LoRA holds.

    Attributes:
        layers: Number of layers that it holds as matrices.
        captured: Share of the squared norm of the change that it holds.
        rank_90: Smallest rank of all layers that holds 90 % of what any rank can hold; None if that
            is beyond the singular values that were computed.
        rank_99: The same for 99 %.
        left_out: Share of the squared norm in tensors that it leaves out.
    """

    layers: int
    captured: float
    rank_90: int | None
    rank_99: int | None
    left_out: float

    def __str__(self) -> str:
        ranks = ("more" if rank is None else f"{rank:,}" for rank in (self.rank_90, self.rank_99))
        return (
            f"{self.layers:7,}{self.captured:10.1%}"
            + "".join(f"{rank:>10}" for rank in ranks)
            + f"{self.left_out:10.1%}"
        )


@dataclass(kw_only=True)
class _Group:
    layers: int = 0
    matrices: float = 0.0
    held: float = 0.0
    plain: float = 0.0
    left_out: float = 0.0
    curve: torch.Tensor | None = None
    known: int | None = None
    """Up to which rank the curve is that of all layers; None for any."""

    def add(self, factors: Factors) -> None:
        curve = factors.energies.cumsum(0)
        known = self.curve if self.curve is not None else curve.new_zeros(1)
        longest = max(len(curve), len(known))
        self.curve = _lengthened(curve, longest) + _lengthened(known, longest)
        if not factors.is_whole:
            self.known = min(len(curve), self.known or len(curve))
        self.layers += 1
        self.matrices += factors.total
        self.held += factors.held

    def rank_for(self, share: float) -> int | None:
        if self.curve is None:
            return 0
        curve = self.curve[: self.known]
        wanted = share * (float(curve[-1]) if self.known is None else self.matrices)
        found = int(torch.searchsorted(curve, wanted))
        return None if found == len(curve) else found + 1


@dataclass
class Energies:
    """Adds up squared norms by group, and under `all`."""

    groups: dict[str, _Group] = field(default_factory=lambda: defaultdict(_Group))

    def add(self, name: str, factors: Factors) -> None:
        """Add a layer that is held as matrices."""
        for group in self._of(name):
            group.add(factors)

    def hold(self, name: str, difference: torch.Tensor) -> None:
        """Add a tensor that is held as it is."""
        for group in self._of(name):
            group.plain += _energy(difference)

    def leave_out(self, name: str, difference: torch.Tensor) -> None:
        """Add a tensor that is not held."""
        for group in self._of(name):
            group.left_out += _energy(difference)

    def report(self) -> dict[str, Energy]:
        """Return the sums, in the order of the groups."""
        found = {}
        for name in (*GROUPS, OTHER, "all"):
            group = self.groups.get(name)
            if group is None:
                continue
            total = group.matrices + group.plain + group.left_out
            if total:
                found[name] = Energy(
                    layers=group.layers,
                    captured=(group.held + group.plain) / total,
                    rank_90=group.rank_for(0.90),
                    rank_99=group.rank_for(0.99),
                    left_out=group.left_out / total,
                )
        return found

    def _of(self, name: str) -> Iterable[_Group]:
        return self.groups[group_of(name)], self.groups["all"]


def _energy(difference: torch.Tensor) -> float:
    return float(difference.double().square().sum())


def _lengthened(curve: torch.Tensor, length: int) -> torch.Tensor:
    return torch.cat([curve, curve[-1:].expand(length - len(curve))])
