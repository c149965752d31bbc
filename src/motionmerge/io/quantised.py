"""Which numbers of a checkpoint are codes instead of weights, and which scales belong to them.

    weight = code * scale     one scale for a tensor, a row or a block; codes in fp8 or int8

Names of scales: `X.scale_weight` (ComfyUI until 2025, kijai, musubi-tuner), `X.weight_scale`
(ComfyUI with `X.comfy_quant` or `_quantization_metadata`, LightX2V, modelopt),
`X.weight_scale_inv` (transformers' fine-grained fp8, which multiplies too) and `X.SCB`
(bitsandbytes' int8, in units of 1/127). Whatever else holds codes is refused by name.
Source: QUANTIZATION.md and comfy/utils.py of ComfyUI, fp8_optimization_utils.py of musubi-tuner,
docs/FORMATS.md of convert_to_quant, the state dicts of bitsandbytes and torchao.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from motionmerge.errors import CheckpointError
from motionmerge.tensors import DType, dtype_name, num_bytes

MARKER = "scaled_fp8"
"""Name of ComfyUI's marker of files with `scale_weight`, alone or behind a prefix."""

CONFIG = "comfy_quant"
_METADATA = "_quantization_metadata"
_SCALES = ("scale_weight", "weight_scale", "weight_scale_inv", "SCB")
_ACTIVATIONS = ("input_scale", "scale_input")
_CODES = (DType.FP8_E4M3FN, DType.FP8_E5M2, DType.INT8)
_FP8 = (DType.FP8_E4M3FN, DType.FP8_E5M2)
_INVERSE_BLOCK = 128
_BLOCKS = tuple(2**power for power in range(4, 12))

_FORMATS = {
    "float8_e4m3fn": DType.FP8_E4M3FN,
    "float8_e4m3fn_rowwise": DType.FP8_E4M3FN,
    "float8_e4m3fn_blockwise": DType.FP8_E4M3FN,
    "float8_e4m3fn_block3d": DType.FP8_E4M3FN,
    "float8_e5m2": DType.FP8_E5M2,
    "int8_tensorwise": DType.INT8,
    "int8_blockwise": DType.INT8,
}
"""Formats of ComfyUI and convert_to_quant whose weight is code * scale."""

_NEUTRAL = (
    "format",
    "full_precision_matrix_mult",
    "group_size",
    "block_size",
    "per_row",
    "per_channel",
    "orig_dtype",
    "convrot_groupsize",
)
"""Settings of a layer that do not change what its codes stand for."""

UNQUANTISED = (
    "Give unquantised weights (bf16, fp16 or fp32) of every input. Or leave this model quantised, "
    "and give it LoRAs while it makes the video: they need no weights of the model."
)

_FOREIGN = {
    name: re.compile(pattern)
    for name, pattern in {
        "bitsandbytes 4-bit (nf4 or fp4)": (
            r"\.(absmax|quant_map|nested_absmax|nested_quant_map|quant_state\.[^.]+)$"
        ),
        "torchao": r"(:(qdata|_data|scale|zero_point|tensor_impl.*)|\._weight_qdata)$",
        "optimum-quanto": r"\.weight\._(data|scale|shift)$",
        "SVDQuant (nunchaku)": r"\.(wscales|wtscale|smooth_factor|wzeros)$",
        "HQQ": r"\.W_q$",
        "GPTQ or AWQ": r"\.(qweight|qzeros|g_idx)$",
        "modelopt": r"\.weight_quantizer\.[^.]+$",
    }.items()
}
"""Formats that are refused, by what their keys look like."""


class Stored(Protocol):
    """An open checkpoint."""

    def keys(self) -> list[str]: ...
    def shape(self, name: str, /) -> tuple[int, ...]: ...
    def dtype(self, name: str, /) -> DType: ...
    def read_into(self, name: str, begin: int, target: memoryview, /) -> None: ...


@dataclass(frozen=True)
class Grid:
    """Where scales belong: the weight is a matrix of so many columns, cut into equal blocks.

    Attributes:
        columns: Of the matrix.
        block: Rows and columns of a block; the last ones may be cut off.
        scales: Rows and columns of blocks, each of which has a scale.
    """

    columns: int
    block: tuple[int, int]
    scales: tuple[int, int]


@dataclass(frozen=True, kw_only=True)
class ScaledWeight:
    """A weight that is stored as codes.

    Attributes:
        name: Its name.
        codes: Dtype of the codes.
        scale: Name of its scales.
        grid: Where they belong.
        settings: What the file says about the layer.
    """

    name: str
    codes: DType
    scale: str
    grid: Grid
    settings: Mapping[str, Any]

    @property
    def layer(self) -> str:
        """The module that it belongs to."""
        return self.name.rpartition(".")[0]

    @property
    def style(self) -> str:
        """Last part of the name of its scales."""
        return self.scale.rpartition(".")[2]


@dataclass(frozen=True)
class Quantisation:
    """The quantised weights of a checkpoint.

    Attributes:
        weights: By name.
        hidden: Names of what is no weight: scales, markers, settings.
    """

    weights: Mapping[str, ScaledWeight]
    hidden: frozenset[str]


def find_quantisation(
    file: Stored, metadata: Mapping[str, str], *, called: str
) -> Quantisation | None:
    """Look through the names of a checkpoint; None if it holds nothing but weights.

    Args:
        file: The open checkpoint.
        metadata: Of its header.
        called: Its name in messages.

    Raises:
        CheckpointError: It holds codes that are not read, or scales that do not fit to its weights.
    """
    if found := foreign_format(file.keys(), metadata):
        raise CheckpointError(
            f"`{called}` is quantised: {found[0]}, {found[1]} layers.", fix=UNQUANTISED
        )
    return _Reader(file, metadata, called).read()


def refuse_quantised(file: Stored, metadata: Mapping[str, str], *, called: str) -> None:
    """Check that every tensor of a checkpoint holds its values, where no codes are read.

    Raises:
        CheckpointError: It is quantised, or its scales do not fit to its weights.
    """
    found = find_quantisation(file, metadata, called=called)
    if found is not None and found.weights:
        raise CheckpointError(
            f"`{called}` is quantised: {len(found.weights)} of its weights are codes with scales.",
            fix="Give unquantised weights (bf16, fp16 or fp32); `motionmerge merge` writes them: "
            "a recipe with this file as an input, `base`, and the expert `all: base`.",
        )


def describe_quantisation(file: Stored, metadata: Mapping[str, str]) -> str | None:
    """Describe in a few words how a checkpoint is quantised, None if it is not; refuse nothing."""
    if found := foreign_format(file.keys(), metadata):
        return f"{found[0]}, {found[1]} layers; only LoRAs can be used with it"
    try:
        quantisation = find_quantisation(file, metadata, called="the file")
    except CheckpointError as error:
        return f"not readable: {error.message}"
    if quantisation is None or not quantisation.weights:
        return None
    kinds: dict[str, int] = {}
    for weight in quantisation.weights.values():
        kind = f"{dtype_name(weight.codes)} with `{weight.style}`"
        kinds[kind] = kinds.get(kind, 0) + 1
    return ", ".join(f"{kind}: {count} layers" for kind, count in kinds.items())


def refuse_scales_elsewhere(path: Path, file: Stored, *, called: str) -> None:
    """Refuse fp8 whose scales are in another file: `X_map.pt` beside `X.pt`, as of HunyuanVideo.

    Raises:
        CheckpointError: There is such a file, and fp8 in this one.

    Source: hyvideo/modules/fp8_optimization.py of HunyuanVideo.
    """
    beside = path.with_name(f"{path.stem}_map{path.suffix}")
    if beside.is_file() and any(file.dtype(key) in _FP8 for key in file.keys()):  # noqa: SIM118
        raise CheckpointError(
            f"`{called}` is quantised: it has codes in fp8, and their scales are in {beside.name}, "
            "which is not read.",
            fix=UNQUANTISED,
        )


def beside_weights(file: Stored, metadata: Mapping[str, str]) -> frozenset[str]:
    """Return the tensors that are no weights: scales, markers, settings; refuse nothing.

    Empty for formats that are not read.
    """
    try:
        quantisation = find_quantisation(file, metadata, called="the file")
    except CheckpointError:
        return frozenset()
    return frozenset() if quantisation is None else quantisation.hidden


def looks_like_codes(name: str, dtype: DType, shape: Sequence[int]) -> bool:
    """Check whether integers are a weight's codes: matrices named `weight`, of at most 32 bits."""
    is_matrix = len(shape) > 1 and not dtype.is_floating_point and dtype.itemsize < 8
    return is_matrix and dtype != DType.BOOL and name.rpartition(".")[2] == "weight"


def foreign_format(keys: Iterable[str], metadata: Mapping[str, str]) -> tuple[str, int] | None:
    """Name a format whose codes are not read, and count its layers; None if there is none."""
    for name, pattern in _FOREIGN.items():
        layers = {key[: match.start()] for key in keys if (match := pattern.search(key))}
        if layers:
            return name, len({layer.removesuffix(".weight") for layer in layers})
    return None


class _Reader:
    """Reads the settings of one checkpoint and finds its scales."""

    def __init__(self, file: Stored, metadata: Mapping[str, str], called: str) -> None:
        self._file, self._metadata, self._called = file, metadata, called
        self._keys = dict.fromkeys(file.keys())
        self._hidden: set[str] = set()
        # ComfyUI multiplies in full precision where the marker has two entries.
        self._is_precise = any(
            key.rpartition(".")[2] == MARKER and math.prod(file.shape(key)) == 2
            for key in self._keys
        )

    def read(self) -> Quantisation | None:
        scales: dict[str, str] = {}
        for key in self._keys:
            layer, _, last = key.rpartition(".")
            if last in (MARKER, CONFIG):
                # Weights without a scale behind the marker are their own values: scaled_fp8_ops in
                # comfy/ops.py of ComfyUI leaves the `scale_weight` of such a layer at 1.
                self._hidden.add(key)
            elif last in _SCALES:
                if layer in scales:
                    raise self._refused(layer, f"has two scales, `{scales[layer]}` and `{key}`")
                scales[layer] = key
        settings = self._settings()
        weights = [
            self._weight(layer, scales.get(layer), settings.get(layer, {}))
            for layer in dict.fromkeys((*scales, *settings))
        ]
        self._check_companions({weight.layer for weight in weights})
        if not weights and not self._hidden:
            return None
        if any(weight.codes == DType.INT8 for weight in weights):
            self._refuse_rotated()
        return Quantisation({weight.name: weight for weight in weights}, frozenset(self._hidden))

    def _refused(self, layer: str, fault: str, *, fix: str | None = None) -> CheckpointError:
        return CheckpointError(f"`{layer}` of `{self._called}` {fault}.", fix=fix or UNQUANTISED)

    def _settings(self) -> dict[str, dict[str, Any]]:
        """Gather what tensors of JSON and the header say about layers."""
        found: dict[str, dict[str, Any]] = {}
        for key in self._keys:
            layer, _, last = key.rpartition(".")
            if last == CONFIG:
                found[layer] = self._parsed(layer, self._text(key))
        listed = self._metadata.get(_METADATA)
        if listed is None:
            return found
        layers = self._parsed(_METADATA, listed).get("layers")
        if not isinstance(layers, dict):
            raise self._refused(_METADATA, "lists no layers", fix="Download the file again.")
        for short, entry in layers.items():
            layer = self._full_name(short)
            config = {"format": entry} if isinstance(entry, str) else entry
            if not isinstance(config, dict):
                raise self._refused(layer, f"has the settings {str(entry)[:100]!r}")
            if found.setdefault(layer, config).get("format") != config.get("format"):
                raise self._refused(
                    layer, f"has two formats: {found[layer].get('format')}, {config.get('format')}"
                )
        return found

    def _text(self, key: str) -> bytes:
        size = num_bytes(self._file.dtype(key), self._file.shape(key))
        if size > 1 << 16:
            raise self._refused(key, f"has {size} bytes, too many for settings")
        text = bytearray(size)
        if text:
            self._file.read_into(key, 0, memoryview(text))
        return bytes(text)

    def _parsed(self, name: str, text: str | bytes) -> dict[str, Any]:
        try:
            found = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise self._refused(name, f"has settings that are not JSON ({error})") from error
        if not isinstance(found, dict):
            raise self._refused(name, f"has the settings {str(found)[:100]!r}")
        return found

    def _full_name(self, layer: str) -> str:
        """Find a layer of the header, which may lack the prefix that tensors have."""
        if f"{layer}.weight" in self._keys:
            return layer
        longer = [key for key in self._keys if key.endswith(f".{layer}.weight")]
        if len(longer) != 1:
            raise self._refused(
                str(layer),
                f"is in the header's list of quantised layers, and {len(longer)} tensors fit to it",
                fix="Download the file again.",
            )
        return longer[0].removesuffix(".weight")

    def _weight(self, layer: str, scale: str | None, settings: Mapping[str, Any]) -> ScaledWeight:
        """Check that a layer's codes, scales and settings fit together."""
        name = _join(layer, "weight")
        if name not in self._keys:
            raise self._refused(
                layer, f"has `{scale or CONFIG}` and no `weight`", fix="Download the file again."
            )
        codes = self._codes(layer, name, settings)
        if scale is None:
            raise self._refused(layer, f"is marked as {dtype_name(codes)} and has no scale")
        if codes not in _CODES:
            raise self._refused(
                layer, f"has a scale, `{scale}`, beside a weight in {dtype_name(codes)}"
            )
        self._hidden.add(scale)
        self._hidden.update(
            key for last in _ACTIVATIONS if (key := _join(layer, last)) in self._keys
        )
        if scale.endswith(".SCB"):
            self._check_order(layer)
        if not self._file.dtype(scale).is_floating_point or self._file.dtype(scale) in _CODES:
            raise self._refused(
                layer,
                f"has scales in {dtype_name(self._file.dtype(scale))}, as mxfp8 and nvfp4 have",
            )
        shape, scales = self._file.shape(name), self._file.shape(scale)
        size = settings.get("group_size") or settings.get("block_size")
        grids = _grids(shape, scales, size if isinstance(size, int) else None)
        if scale.endswith("_inv") and not size:  # transformers' own size, wherever it fits
            grids = _grids(shape, scales, _INVERSE_BLOCK) or grids
        if len(grids) != 1:
            why = "can be dealt over it in more than one way" if grids else "do not fit to it"
            raise self._refused(
                layer, f"has a weight {list(shape)} and scales {list(scales)}, which {why}"
            )
        if scale.endswith("scale_weight") and self._is_precise:
            settings = {**settings, "full_precision_matrix_mult": True}
        return ScaledWeight(
            name=name, codes=codes, scale=scale, grid=grids.pop(), settings=settings
        )

    def _codes(self, layer: str, name: str, settings: Mapping[str, Any]) -> DType:
        """Return the dtype of a layer's codes; a file may keep those of fp8 as bytes."""
        stored = self._file.dtype(name)
        if not settings:
            return stored
        wanted = _FORMATS.get(str(settings.get("format")))
        inner = settings.get("params")
        changed = {**settings, **(inner if isinstance(inner, dict) else {})}
        changed.pop("params", None)
        if changed.get("orig_shape") == list(self._file.shape(name)):
            del changed["orig_shape"]
        odd = [
            f"{key} = {value}" for key, value in changed.items() if value and key not in _NEUTRAL
        ]
        if wanted is None or odd:
            what = [f"format {settings.get('format')}", *odd]
            raise self._refused(layer, f"is quantised in a way that is not read: {', '.join(what)}")
        if stored not in (wanted, DType.UINT8):
            raise self._refused(
                layer, f"is marked as {settings.get('format')} and stored in {dtype_name(stored)}"
            )
        return wanted

    def _check_order(self, layer: str) -> None:
        """Check that bitsandbytes stored the rows of an int8 weight one behind the other."""
        key = _join(layer, "weight_format")
        if key in self._keys:
            self._hidden.add(key)
            if any(self._text(key)):
                raise self._refused(layer, "is stored in an order of bitsandbytes' own")

    def _refuse_rotated(self) -> None:
        """Refuse weights that were multiplied with a Hadamard matrix before they became codes."""
        for key, text in self._metadata.items():
            if key != _METADATA and "convrot" in f"{key} {text}".lower():
                raise self._refused(key, "in the header says that its weights are rotated")

    def _check_companions(self, layers: set[str]) -> None:
        """Refuse what stands beside codes, and may change what they stand for.

        Beside fp8 without a known scale as well, which otherwise is plain numbers: whatever a layer
        has beyond weight and bias may be a scale under a name that is not known.
        """
        is_marked = any(key.rpartition(".")[2] == MARKER for key in self._hidden)
        for key in self._keys:
            layer, _, last = key.rpartition(".")
            layer = layer.removesuffix(".weight")  # `X.weight.scale` belongs to `X` too
            is_harmless = last in ("weight", "bias") or (is_marked and last in _ACTIVATIONS)
            if key in self._hidden or is_harmless:
                continue
            name = _join(layer, "weight")
            if layer in layers or (name in self._keys and self._file.dtype(name) in _FP8):
                raise self._refused(layer, f"has `{last}`, which is not read, beside its codes")


def _join(layer: str, last: str) -> str:
    return f"{layer}.{last}" if layer else last


def _grids(shape: Sequence[int], scales: Sequence[int], size: int | None) -> set[Grid]:
    """List the ways in which scales can belong to a weight.

    Args:
        shape: Of the weight.
        scales: Their shape.
        size: Rows and columns of a block, if known.
    """
    count, total = math.prod(scales), math.prod(shape)
    if count == 1:
        whole = max(total, 1)
        return {Grid(whole, (1, whole), (1, 1))}
    if not count or not total or not shape:
        return set()
    rows, columns = shape[0], total // shape[0]
    if scales[0] == rows and count == rows:
        return {Grid(columns, (1, columns), (rows, 1))}
    if len(scales) == 3 and (scales[0], scales[2]) == (rows, 1) and columns % scales[1] == 0:
        return {Grid(columns, (1, columns // scales[1]), (rows, scales[1]))}
    if len(scales) != 2 or len(shape) != 2:
        return set()
    high, wide = dealt = scales[0], scales[1]
    blocks = [(block, block) for block in ((size,) if size else _BLOCKS)]
    if size:
        blocks.append((1, size))
    elif rows % high == 0 and columns % wide == 0:
        blocks.append((rows // high, columns // wide))
    return {
        Grid(columns, (rows if high == 1 else block[0], columns if wide == 1 else block[1]), dealt)
        for block in blocks
        if (-(-rows // block[0]), -(-columns // block[1])) == dealt
    }
