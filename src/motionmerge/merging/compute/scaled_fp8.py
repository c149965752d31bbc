"""Writes scaled fp8 (`--dtype fp8_scaled`): codes in e4m3fn with one scale for each weight.

    scale = max |weight| / 448,   code = round(weight / scale)

Names are those of ComfyUI: `X.weight_scale` and `X.comfy_quant`, or until 2025 `X.scale_weight` and
one `scaled_fp8`. The checkpoint at the front of the expression says which, else the newer ones.
Source: QUANTIZATION.md of ComfyUI, and convert_old_quants in its comfy/utils.py.
"""

from __future__ import annotations

import json
import math
import re
import threading
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from motionmerge.errors import CheckpointError, ConfigError
from motionmerge.io.quantised import CONFIG, MARKER, ScaledWeight
from motionmerge.lazy_torch import torch
from motionmerge.merging.algebra.nodes import Checkpoint
from motionmerge.merging.algebra.results import ResultSpec
from motionmerge.merging.compute.compiled import Bytes, Floats, compiled_kernels
from motionmerge.merging.compute.plan import MergeJob, Sink
from motionmerge.merging.compute.renaming import RenamingSink, renamed_specs
from motionmerge.merging.compute.streaming import ReportProgress, stream
from motionmerge.merging.inputs.dequantised import values_of_codes
from motionmerge.merging.inputs.pieces import Piece, Pieced, PieceLayout, whole
from motionmerge.merging.inputs.sources import OpenInputs, Place, Source
from motionmerge.tensors import DType, num_bytes

Key = TypeVar("Key")

SCALED_FP8 = "fp8_scaled"
"""The `dtype` with which users ask for it."""

LARGEST = np.float32(448)
"""The largest number of e4m3fn."""

_SMALLEST_SCALE = np.float32(2.0**-126)
_FITS = np.float32(464)
_OLD_STYLE = "scale_weight"
_PREFIXES = ("model.diffusion_model.", "model.model.", "net.")
_COPIED_AT_ONCE = 4 << 20
_PRECISE = re.compile(r"norm|embed|modulation|adaln|^mod$|_mod$|^emb")
"""Parts of names of layers that keep their dtype where the checkpoint itself does not say which."""


@dataclass(frozen=True, kw_only=True)
class ScaledFp8:
    """The contents of one file.

    Attributes:
        anchor: The checkpoint at the front.
        layout: The file's tensors, as pieces of the expert's.
        specs: Dtype and shape of the expert's tensors; fp32 for those that become codes.
        codes: Names in the file of the weights that become codes.
        copied: Those of them whose codes and scale are the anchor's own, and their names there.
        notes: Names and contents of what says how each layer is stored.
        style: Last part of the name of a scale.
    """

    anchor: Source
    layout: PieceLayout
    specs: Mapping[str, ResultSpec]
    codes: tuple[str, ...]
    copied: Mapping[str, str]
    notes: Mapping[str, tuple[ResultSpec, bytes]]
    style: str

    @property
    def computed(self) -> dict[str, Pieced]:
        """Weights whose codes are computed."""
        return {name: self.layout[name] for name in self.codes if name not in self.copied}

    @property
    def streamed(self) -> dict[str, Pieced]:
        """All but what is copied as codes."""
        return {name: it for name, it in self.layout.items() if name not in self.copied}

    def needed(self, layout: PieceLayout) -> dict[str, ResultSpec]:
        """Return dtype and shape of the expert's tensors of which some tensors are made."""
        names = {piece.name for tensor in layout.values() for piece in tensor.pieces}
        return {name: spec for name, spec in self.specs.items() if name in names}

    @property
    def file_specs(self) -> dict[str, ResultSpec]:
        """Dtype and shape of all that the file holds."""
        codes = set(self.codes)
        held = {
            name: (DType.FP8_E4M3FN if name in codes else dtype, shape)
            for name, (dtype, shape) in renamed_specs(self.layout, self.specs).items()
        }
        held |= {self.scale_of(name): (DType.FP32, ()) for name in self.codes}
        return held | {name: spec for name, (spec, _) in self.notes.items()}

    @property
    def note(self) -> str:
        """One sentence about it, for reports."""
        text = f"{len(self.codes)} weights are written as fp8 codes and scales (`{self.style}`)"
        return f"{text}, {len(self.copied)} of them as they were" if self.copied else text

    def scale_of(self, name: str) -> str:
        """Return the name of a weight's scale."""
        return _beside(name, self.style)


def plan_scaled_fp8(
    anchor: Source,
    specs: Mapping[str, ResultSpec],
    opened: OpenInputs,
    *,
    reached: Collection[str],
    layout: PieceLayout | None = None,
) -> ScaledFp8:
    """Decide which weights become codes: those that are in the anchor.

    Where it has none: matrices inside numbered blocks, but for norms, embeddings and modulations.
    What no task vector reaches keeps its codes.

    Args:
        anchor: The checkpoint at the front.
        specs: Dtype and shape of the expert's tensors.
        opened: The open inputs.
        reached: Names of the tensors that task vectors change.
        layout: The file's tensors, as pieces of the expert's; by default they are the same.

    Raises:
        ConfigError: There is no such weight.
    """
    if layout is None:
        layout = {name: whole(name, shape) for name, (_, shape) in specs.items()}
    known = {name: found for name in specs if (found := opened.scaled(anchor, name))}
    made_of = {name: _names_of(tensor) for name, tensor in layout.items()}
    num_uses = Counter(one for names in made_of.values() for one in names)
    chosen = tuple(
        name
        for name, tensor in layout.items()
        if all(num_uses[one] == 1 for one in made_of[name])  # survival looks at one scale for each
        and (
            known.keys() >= made_of[name]
            if known
            else _is_linear(name, tensor.shape, [specs[one][0] for one in made_of[name]])
        )
    )
    if not chosen:
        raise ConfigError(
            f"`{anchor.name}` has no weight that ComfyUI would store as scaled fp8.",
            fix="Use `dtype='bf16'`.",
        )
    weights = {name: [known[one] for one in made_of[name] if one in known] for name in chosen}
    styles = [weight.style for each in weights.values() for weight in each]
    style = _OLD_STYLE if styles and max(styles, key=styles.count) == _OLD_STYLE else "weight_scale"
    computed = {one for name in chosen for one in made_of[name]}
    return ScaledFp8(
        anchor=anchor,
        layout=layout,
        specs={
            name: (DType.FP32 if name in computed else dtype, shape)
            for name, (dtype, shape) in specs.items()
        },
        codes=chosen,
        copied={
            name: source
            for name in chosen
            if (source := _whole_of(layout[name], specs)) in known
            and source not in reached
            and known[source].codes == DType.FP8_E4M3FN
            and known[source].grid.scales == (1, 1)
        },
        notes=_notes(weights, style=style),
        style=style,
    )


def _names_of(tensor: Pieced) -> set[str]:
    return {piece.name for piece in tensor.pieces}


def _whole_of(tensor: Pieced, specs: Mapping[str, ResultSpec]) -> str:
    """Return the name of the tensor that one is as it is; empty if it is cut or joined."""
    name = tensor.pieces[0].name
    return name if tensor.pieces == (Piece(name, 0, math.prod(specs[name][1])),) else ""


def _is_linear(name: str, shape: Sequence[int], dtypes: Sequence[DType]) -> bool:
    *parts, last = name.split(".")
    return (
        last == "weight"
        and len(shape) == 2
        and all(dtype.is_floating_point for dtype in dtypes)
        and min(shape) > 1
        and any(part.isdigit() for part in parts[:-1])  # the last is the layer's own
        and not any(_PRECISE.search(part) for part in parts)
    )


def _notes(
    weights: Mapping[str, Sequence[ScaledWeight]], *, style: str
) -> dict[str, tuple[ResultSpec, bytes]]:
    """Write what tells ComfyUI how layers are stored.

    Args:
        weights: By the name of each weight that becomes codes, what it was in the anchor.
        style: Last part of the name of a scale.
    """
    key = "full_precision_matrix_mult"
    precise = {name for name, each in weights.items() if any(w.settings.get(key) for w in each)}
    if style == _OLD_STYLE:  # two entries say that ComfyUI multiplies in full precision
        prefix = next((p for p in _PREFIXES if all(n.startswith(p) for n in weights)), "")
        size = 2 if precise else 0
        return {prefix + MARKER: ((DType.FP8_E4M3FN, (size,)), bytes(size))}
    notes: dict[str, tuple[ResultSpec, bytes]] = {}
    for name in weights:
        settings = {"format": "float8_e4m3fn"} | ({key: True} if name in precise else {})
        text = json.dumps(settings).encode()
        notes[_beside(name, CONFIG)] = ((DType.UINT8, (len(text),)), text)
    return notes


def _beside(name: str, last: str) -> str:
    layer = name.rpartition(".")[0]
    return f"{layer}.{last}" if layer else last


class Maxima:
    """A sink that keeps the largest magnitude of each tensor, and nothing else."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._found: dict[str, np.float32] = {}

    def place(self, name: str, /) -> None:
        """Return None: no tensor lies in a file."""

    def write_at(self, name: str, begin: int, data: memoryview, /) -> None:
        """Look at values in fp32."""
        values = np.frombuffer(data, np.float32)
        if values.size:
            high = np.fmax(np.fmax.reduce(values), -np.fmin.reduce(values))
            with self._lock:
                self._found[name] = np.fmax(self._found.get(name, np.float32(0)), high)

    def scales(self, names: Iterable[str]) -> dict[str, np.float32]:
        """Return the scale of each tensor: 1 where all is zero, never less than a normal number.

        Raises:
            CheckpointError: A value is infinite.
        """
        scales = {}
        for name in names:
            largest = self._found.get(name, np.float32(0))
            if np.isinf(largest):
                raise CheckpointError(
                    f"`{name}` holds infinity, which fp8 (e4m3fn) has not.",
                    fix="Write it with dtype bf16 or fp32.",
                )
            scale = max(largest / LARGEST, _SMALLEST_SCALE)
            scales[name] = scale if largest > 0 else np.float32(1)
        return scales


class ScaledSink:
    """A sink that makes codes of values in fp32, and hands on what keeps its dtype.

    Args:
        file: Where all goes.
        scales: Of the weights that become codes.
    """

    def __init__(self, file: Sink, scales: Mapping[str, np.float32]) -> None:
        self._file, self._scales = file, scales

    def place(self, name: str, /) -> Place | None:
        """Return where a tensor begins; codes have no place, as they are fewer bytes."""
        return None if name in self._scales else self._file.place(name)

    def write_at(self, name: str, begin: int, data: memoryview, /) -> None:
        if name not in self._scales:
            self._file.write_at(name, begin, data)
        elif data:
            codes = quantise(np.frombuffer(data, np.float32), self._scales[name])
            self._file.write_at(name, begin // 4, codes.data)


def quantise(values: Floats, scale: np.float32) -> Bytes:
    """Divide by a scale and round to the nearest e4m3fn, ties to even; NaN stays NaN."""
    values = np.ascontiguousarray(values, np.float32)
    codes = np.empty(values.size, np.uint8)
    if kernels := compiled_kernels():
        kernels.quantise(values, float(scale), codes)
    else:
        scaled = values / np.float32(scale)
        scaled[np.abs(scaled) > _FITS] = np.nan  # which torch would make 448
        codes[:] = torch.from_numpy(scaled).to(torch.float8_e4m3fn).view(torch.uint8).numpy()
    return codes


def measure_scales(
    bound: Mapping[Key, Checkpoint],
    plans: Mapping[Key, ScaledFp8],
    opened: OpenInputs,
    *,
    threads: int | None,
    progress: ReportProgress | None,
) -> dict[Key, dict[str, np.float32]]:
    """Compute, per file, the scales of its weights, in a pass of its own over the inputs.

    Args:
        bound: The expert of each file.
        plans: What each file holds.
        opened: The open inputs.
        threads: How many; None takes one per core.
        progress: Called after each chunk.

    Raises:
        CheckpointError: As `stream`, or a value is infinite.
    """
    sinks = {key: Maxima() for key in plans}
    jobs = []
    for key, plan in plans.items():
        specs = plan.needed(plan.computed)
        jobs.append(
            MergeJob(
                checkpoint=bound[key],
                specs=specs,
                sink=RenamingSink(sinks[key], plan.computed, specs),
            )
        )
    if any(job.specs for job in jobs):
        stream(jobs, opened, threads=threads, progress=progress)
    return {key: sinks[key].scales(plan.computed) for key, plan in plans.items()}


def scaled_job(
    checkpoint: Checkpoint, plan: ScaledFp8, file: Sink, scales: Mapping[str, np.float32]
) -> MergeJob:
    """Return the job that writes an expert as scaled fp8, but for `write_the_rest`."""
    specs = plan.needed(plan.streamed)
    scale_of = {one: scales[name] for name, it in plan.computed.items() for one in _names_of(it)}

    def as_stored(name: str, values: Floats) -> Floats:
        scale = scale_of.get(name)
        if scale is None:
            return values
        return values_of_codes(DType.FP8_E4M3FN)[quantise(values, scale)] * scale

    sink = RenamingSink(ScaledSink(file, scales), plan.streamed, specs)
    return MergeJob(checkpoint=checkpoint, specs=specs, sink=sink, as_stored=as_stored)


def write_the_rest(
    plan: ScaledFp8, file: Sink, scales: Mapping[str, np.float32], opened: OpenInputs
) -> None:
    """Write scales, notes, and the codes that stay as they are."""
    source = opened.codes(plan.anchor)
    for name, held in plan.copied.items():
        assert source is not None  # it said which are stored as codes
        size = num_bytes(DType.FP8_E4M3FN, plan.specs[held][1])
        for begin in range(0, size, _COPIED_AT_ONCE):
            codes = np.empty(min(_COPIED_AT_ONCE, size - begin), np.uint8)
            source.read_codes(held, begin, codes.data)
            file.write_at(name, begin, codes.data)
        file.write_at(plan.scale_of(name), 0, source.scales(held).view(np.uint8).reshape(-1).data)
    for name, scale in scales.items():
        file.write_at(plan.scale_of(name), 0, memoryview(scale.tobytes()))
    for name, (_, text) in plan.notes.items():
        file.write_at(name, 0, memoryview(text))
