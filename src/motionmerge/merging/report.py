"""What a merge did: coverage, groups, how much of the task vector survived rounding, speed."""

from __future__ import annotations

import math
import re
import sys
import threading
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

_SHOWN = 5
"""Names of tensors in a warning."""

LOW_SURVIVAL = 0.5
"""Below this share of surviving entries a report warns."""


class Survival:
    """Adds up, sample by sample, how much of a task vector is left after rounding.

    survived = #(rounded != kept and ideal != anchor) / #(ideal != anchor)
    cosine   = <rounded - kept, ideal - anchor> / (|rounded - kept| |ideal - anchor|)

    `ideal` is the result before it is rounded to the output's dtype, `kept` is the anchor after it:
    where the output cannot hold the anchor itself, its own rounding is no change that survived.
    """

    def __init__(self) -> None:
        self.changed = self.survived = 0.0
        self._dot = self._ideal = self._realised = 0.0
        self._lock = threading.Lock()

    def add(
        self,
        *,
        sizes: Sequence[int],
        anchor: npt.NDArray[np.floating],
        ideal: npt.NDArray[np.floating],
        rounded: npt.NDArray[np.floating],
        kept: npt.NDArray[np.floating],
        represents: Sequence[int],
    ) -> list[float]:
        """Count samples that lie one behind the other; all four are `[entries]`. Any thread may.

        Args:
            sizes: The entries of each sample, at least one.
            anchor: What the checkpoint at the front holds there.
            ideal: The result, unrounded.
            rounded: The result as it is stored.
            kept: What would be stored if nothing changed.
            represents: For how many entries each sample stands.

        Returns:
            How many of these should change, for each sample.
        """
        starts = np.cumsum([0, *sizes[:-1]])
        weights = np.divide(represents, sizes)

        def totals(entries: npt.NDArray[np.generic]) -> npt.NDArray[np.float64]:
            return weights * np.add.reduceat(entries, starts, dtype=np.float64)

        should_change = ideal != anchor
        changed = totals(should_change)
        survived = totals(should_change & (rounded != kept)).sum()
        wanted, realised = ideal - anchor, rounded - kept
        dot, wanted_square, realised_square = (
            totals(left * right).sum()
            for left, right in ((wanted, realised), (wanted, wanted), (realised, realised))
        )
        with self._lock:
            self.changed += float(changed.sum())
            self.survived += float(survived)
            self._dot += float(dot)
            self._ideal += float(wanted_square)
            self._realised += float(realised_square)
        return [float(count) for count in changed]

    @property
    def share(self) -> float | None:
        """Share of the entries that should change and did; None if none should."""
        return self.survived / self.changed if self.changed else None

    @property
    def cosine(self) -> float | None:
        """Cosine between the realised and the ideal change; None if nothing should change."""
        if not self._ideal:
            return None
        norms = math.sqrt(self._ideal) * math.sqrt(self._realised)
        return self._dot / norms if norms else 0.0


def peak_memory() -> int:
    """Return the most memory that this process has used so far, in bytes; 0 if nobody knows."""
    status = Path("/proc/self/status")  # what getrusage says on Linux includes the parent's peak
    found = re.search(r"VmHWM:\s*(\d+) kB", status.read_text()) if status.exists() else None
    if found:
        return 1024 * int(found[1])
    try:
        import resource
    except ImportError:  # Windows
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def kept_tensors(unmatched: Collection[str]) -> str:
    """List first the tensors that stay as they are, as some inputs lack them."""
    names = ", ".join(f"`{name}`" for name in [*unmatched][:_SHOWN])
    more = f" and {len(unmatched) - _SHOWN} more" if len(unmatched) > _SHOWN else ""
    return f"{len(unmatched)} tensors were not in every input and were kept: {names}{more}."


@dataclass(frozen=True, kw_only=True)
class ExpertReport:
    """What happened to one expert.

    Attributes:
        formula: Its expression.
        path: The file, or None if none was written.
        num_tensors: Tensors in the result.
        num_parameters: Their elements.
        computed: Tensors that a task vector reaches.
        copied: Tensors taken from the anchor as they are.
        touched: Elements that differ from the anchor before rounding, by parameter group, counted
            on samples of large tensors; in a dry run the elements that task vectors reach.
        survived: Share of those elements that still differ after rounding; None if none do.
        cosine: Between the realised and the ideal change; None if nothing should change.
        num_bytes: Size of the tensors.
        note: What became of weights that are stored as codes and scales; None if none are.
    """

    formula: str
    path: str | None
    num_tensors: int
    num_parameters: int
    computed: int
    copied: int
    touched: Mapping[str, int]
    survived: float | None
    cosine: float | None
    num_bytes: int
    note: str | None = None


@dataclass(frozen=True, kw_only=True)
class MergeReport:
    """What a merge did, or in a dry run would do.

    Attributes:
        experts: By name.
        matched: Number of tensor names that every input has.
        unmatched: Names that a task vector needs and some inputs lack, with those inputs.
        unused_strengths: Number of keys of alpha in LoRA files whose layers these do not hold.
        unchanged: Tensors that a task vector reaches and that are equal in all inputs (0 in a dry
            run).
        knobs: What the schedule sets besides experts, by entry; in `recipe.yaml`, not in weights.
        dry_run: Nothing was read beyond the headers, nothing was written.
        seconds: Wall time, hashing included.
        bytes_read: Bytes of tensors read, without hashing.
        bytes_written: Bytes of tensors written.
        peak_memory: The most memory the process has used, in bytes.
        disk_bytes: What the results take, or would take.
        free_bytes: What the disk had free before.
    """

    experts: Mapping[str, ExpertReport]
    matched: int
    unmatched: Mapping[str, tuple[str, ...]]
    unused_strengths: int
    unchanged: int
    knobs: tuple[str, ...]
    dry_run: bool
    seconds: float
    bytes_read: int
    bytes_written: int
    peak_memory: int
    disk_bytes: int
    free_bytes: int

    @property
    def gigabytes_per_second(self) -> float:
        """Bytes read and written per second of wall time, in 10^9 bytes."""
        moved = self.bytes_read + self.bytes_written
        return moved / self.seconds / 1e9 if self.seconds > 0 else 0.0

    @property
    def warnings(self) -> tuple[str, ...]:
        """What a user should look at, one sentence each."""
        found = [
            f"{name}: rounding swallowed {1 - expert.survived:.0%} of the change "
            f"(cosine {expert.cosine or 0:.2f}); write it in fp32 or fp16 (dtype), or round up "
            "and down at random (stochastic rounding)."
            for name, expert in self.experts.items()
            if expert.survived is not None and expert.survived < LOW_SURVIVAL
        ]
        if self.unmatched:
            found.append(kept_tensors(self.unmatched))
        return tuple(found)

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain values for JSON."""
        return {
            **asdict(self),
            "gigabytes_per_second": self.gigabytes_per_second,
            "warnings": list(self.warnings),
        }

    def __str__(self) -> str:
        head = f"{self.matched} tensors matched"
        if not self.dry_run:
            head += f", {self.unchanged} of them equal in all inputs"
        lines = [head + f", {len(self.unmatched)} unmatched."]
        if self.unused_strengths:
            lines.append(_unused(self.unused_strengths))
        for name, expert in self.experts.items():
            lines.append(f"{name} = {expert.formula}")
            lines.append(
                f"  {expert.num_tensors} tensors ({expert.num_parameters / 1e6:.2f} M parameters, "
                f"{expert.num_bytes / 1e6:.1f} MB): {expert.computed} computed, "
                f"{expert.copied} copied"
            )
            if expert.note:
                lines.append(f"  {expert.note}")
            if expert.touched:
                counts = (f"{group} {count:,}" for group, count in expert.touched.items())
                lines.append(f"  touched: {', '.join(counts)}")
            if expert.survived is not None:
                lines.append(survival_line(expert.survived, expert.cosine))
            if expert.path:
                lines.append(f"  -> {expert.path}")
        if self.knobs:
            lines.append(f"Not in the weights, but in recipe.yaml: {'; '.join(self.knobs)}.")
        if self.dry_run:
            lines.append(
                f"Dry run: nothing was written. The results take {self.disk_bytes / 1e9:.3f} GB of "
                f"disk ({self.free_bytes / 1e9:.1f} GB free)."
            )
        else:
            lines.append(
                f"{self.seconds:.2f} s, {self.bytes_read / 1e9:.3f} GB read, "
                f"{self.bytes_written / 1e9:.3f} GB written, {self.gigabytes_per_second:.2f} GB/s, "
                f"peak memory {self.peak_memory / 1e6:.0f} MB."
            )
        lines += [f"Warning: {warning}" for warning in self.warnings]
        return "\n".join(lines)


def survival_line(survived: float, cosine: float | None) -> str:
    """Write how much of a change survives rounding, as a line of a report."""
    return f"  survives rounding: {survived:.1%} of the entries, cosine {cosine or 0:.4f}"


def _unused(count: int) -> str:
    what = (
        "a strength (alpha), of a layer" if count == 1 else f"{count} strengths (alpha), of layers"
    )
    return f"Unused: {what} that the LoRA does not hold."
