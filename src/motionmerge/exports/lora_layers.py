"""What a LoRA file holds of each tensor's change: two factors, a plain difference, or nothing.

PATH.lora_A.weight, PATH.lora_B.weight    factors of a weight
PATH.diff, PATH.diff_b                    the change of any other tensor, of a layer's bias
PATH.lora_B.bias                          the change of a bias, for diffusers and peft
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from motionmerge.exports.lora_energy import Energies
from motionmerge.exports.lora_factors import factors_of
from motionmerge.exports.lora_file import LoraFile
from motionmerge.exports.sinks import WholeTensors
from motionmerge.exports.targets import Target
from motionmerge.lazy_torch import torch
from motionmerge.merging.algebra.results import ResultSpec
from motionmerge.merging.algebra.rounding import round_once
from motionmerge.merging.compute.renaming import RenamingSink
from motionmerge.merging.inputs.pieces import PieceLayout
from motionmerge.tensors import DType

_DOWN, _UP, _UP_BIAS = "lora_A.weight", "lora_B.weight", "lora_B.bias"


class LoraLayers:
    """Takes the change of each tensor of a model and puts it into a LoRA file; any thread may.

    Attributes:
        energies: How much of the change the file holds.
        differences: Tensors that it holds as plain differences.
        left_out: Tensors that change and that it does not hold, by their names in the model.

    Args:
        layout: The tensors, by the file's names, as pieces of the model's.
        target: The tool that it is for.
        rank: Rank of the factors.
        dtype: Dtype of what is written.
    """

    def __init__(self, layout: PieceLayout, target: Target, *, rank: int, dtype: DType) -> None:
        self.energies = Energies()
        self.differences = 0
        self.left_out: list[str] = []
        self._layout, self._target, self._rank, self._dtype = layout, target, rank, dtype
        self._positions = {name: position for position, name in enumerate(layout)}
        self._lock = threading.Lock()
        self._biases: dict[str, torch.Tensor] = {}
        self._factorised: set[str] = set()

    @contextmanager
    def file_in(self, folder: Path) -> Iterator[None]:
        """Open the file's contents in a folder, without a name."""
        with LoraFile(folder) as self._file:
            yield

    def names(self) -> set[str]:
        """Return the model's tensors that it takes."""
        return {piece.name for tensor in self._layout.values() for piece in tensor.pieces}

    def sink(self, specs: Mapping[str, ResultSpec]) -> RenamingSink:
        """Return where the changes of the model's tensors go, in fp32.

        Args:
            specs: Dtype and shape of the model's tensors.
        """
        shapes = {name: tensor.shape for name, tensor in self._layout.items()}
        return RenamingSink(WholeTensors(shapes, self._take), self._layout, specs)

    def finish(self) -> int:
        """Add what can only be decided when all changes are known; return the number of tensors."""
        biased = all(f"{path}.bias" in self._layout for path in self._factorised)
        for path, change in self._biases.items():
            if not biased or not self._is_matrix(f"{path}.weight"):
                self._leave_out(f"{path}.bias", change)
                continue
            self.energies.hold(self._in_model(f"{path}.bias"), change)
            self.differences += 1
            self._add(f"{path}.bias", f"{path}.{_UP_BIAS}", change)
            if path not in self._factorised:
                self._add_zeros(path)
        if self._biases and biased:  # peft gives all layers a bias, or none
            for path in self._factorised - self._biases.keys():
                shape = self._layout[f"{path}.bias"].shape
                self._add(f"{path}.bias", f"{path}.{_UP_BIAS}", torch.zeros(shape))
        return len(self._file)

    def write(self, path: Path, metadata: Mapping[str, str]) -> None:
        """Write the file, which appears when it is whole.

        Raises:
            CheckpointError: The disk refuses.
        """
        self._file.write(path, metadata)

    def _take(self, name: str, change: torch.Tensor) -> None:
        """Write the change of a tensor into the file, unless it is zero."""
        if not bool(change.any()):
            return
        path, _, leaf = name.rpartition(".")
        if self._is_matrix(name):
            self._add_factors(path, name, change)
        elif self._target.plain_differences and not name.endswith(self._target.drops):
            self.energies.hold(self._in_model(name), change)
            with self._lock:
                self.differences += 1
            self._add(name, self._key_of_difference(name), change)
        elif leaf == "bias" and not self._target.plain_differences:
            with self._lock:
                self._biases[path] = change
        else:
            self._leave_out(name, change)

    def _key_of_difference(self, name: str) -> str:
        """Return the key of a plain difference.

        ComfyUI knows `PATH.diff_b` of a layer with a weight alone.
        """
        path, _, leaf = name.rpartition(".")
        if leaf == "weight":
            return f"{path}.diff"
        is_known = f"{path}.weight" in self._layout or self._target.style != "comfyui"
        return f"{path}.diff_b" if leaf == "bias" and is_known else f"{name}.diff"

    def _is_matrix(self, name: str) -> bool:
        """Check whether two factors stand for a tensor's change."""
        if name not in self._layout or not name.endswith(".weight"):
            return False
        if name.endswith(self._target.drops):
            return False
        return 2 <= len(self._layout[name].shape) <= self._target.most_dimensions

    def _add_factors(self, path: str, name: str, change: torch.Tensor) -> None:
        factors = factors_of(change.flatten(1), rank=self._rank, name=self._in_model(name))
        with self._lock:
            self.energies.add(self._in_model(name), factors)
            self._factorised.add(path)
        kernel = change.shape[2:]
        down = factors.down.reshape(self._rank, change.shape[1], *kernel)
        self._add(name, f"{path}.{_DOWN}", down)
        self._add(name, f"{path}.{_UP}", factors.up.reshape(*factors.up.shape, *[1] * len(kernel)))

    def _add_zeros(self, path: str) -> None:
        """Add factors of nothing, beside which a bias can stand."""
        name = f"{path}.weight"
        rows, columns, *kernel = self._layout[name].shape
        self._add(name, f"{path}.{_DOWN}", torch.zeros(self._rank, columns, *kernel))
        self._add(name, f"{path}.{_UP}", torch.zeros(rows, self._rank, *[1] * len(kernel)))

    def _leave_out(self, name: str, change: torch.Tensor) -> None:
        with self._lock:
            self.energies.leave_out(self._in_model(name), change)
            self.left_out.append(self._in_model(name))

    def _add(self, name: str, key: str, value: torch.Tensor) -> None:
        rounded = round_once(value, self._dtype, key)
        self._file.add(self._positions[name], key, rounded)

    def _in_model(self, name: str) -> str:
        return self._layout[name].pieces[0].name
