"""Experts that do not fit are refused before a model is loaded; those that do leave no trace."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.overrides import TorchFunctionMode

from motionmerge.cli.video_flags import VideoFlags
from motionmerge.errors import CheckpointError, MotionMergeError, ShapeError
from motionmerge.sampling.request.experts import (
    ExpertChoice,
    WeightedLora,
    from_loras,
    from_recipe,
    from_weights,
)
from motionmerge.sampling.request.folder import find_pipeline
from motionmerge.sampling.request.loading import load_pipeline

from ..tiny.folders import save_lora

LAYER = "proj_out"
OWN_AND_LORA = """
inputs: {{base: "memory:base", style: {lora}}}
experts:
  dynamics: base - trim(lora(style, 1.0), keep=0.5)
  consistency: base + lora(style, 1.0)
schedule: [{{expert: dynamics, above: 0.64}}, {{expert: consistency}}]
"""


@pytest.fixture
def lora(stored_wan: Path, tmp_path: Path) -> Path:
    transformer = load_pipeline(find_pipeline(stored_wan)).transformer
    save_lora(tmp_path / "lora.safetensors", transformer, LAYER)
    return tmp_path / "lora.safetensors"


@pytest.fixture
def weights(stored_wan: Path, tmp_path: Path) -> Path:
    (file,) = (stored_wan / "transformer").glob("*.safetensors")
    save_file(load_file(file), tmp_path / "weights.safetensors")
    return tmp_path / "weights.safetensors"


def change(path: Path, name: str, *, to: str | torch.Tensor) -> None:
    """Rename a tensor, or replace it."""
    tensors = load_file(path)
    old = tensors.pop(name)
    save_file({**tensors, **({to: old} if isinstance(to, str) else {name: to})}, path)


def own_and_lora(lora: Path) -> ExpertChoice:
    recipe = lora.with_name("recipe.yaml")
    recipe.write_text(OWN_AND_LORA.format(lora=lora))
    return from_recipe(recipe)


def check(choice: ExpertChoice, folder: Path) -> dict[str, Any]:
    modules = VideoFlags(model=str(folder)).request.open_model().empty_modules()
    choice.check(modules)
    return modules


class NoMemoryForLayers(TorchFunctionMode):
    """Fails where a layer is initialised in memory."""

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if function is torch.Tensor.uniform_:
            assert args[0].is_meta
        return function(*args, **(kwargs or {}))


def test_what_fits_is_accepted_and_the_modules_are_as_before(
    stored_wan: Path, lora: Path, weights: Path
) -> None:
    before = check(ExpertChoice(), stored_wan)
    names = {part: list(module.state_dict()) for part, module in before.items()}
    assert names["transformer"]
    for choice in (
        from_loras([WeightedLora(lora)]),
        from_loras([WeightedLora(lora, -0.25)], boundary=0.9),
        from_weights(weights),
        own_and_lora(lora),
    ):
        with NoMemoryForLayers():
            after = check(choice, stored_wan)
        assert {part: list(module.state_dict()) for part, module in after.items()} == names
        assert all(p.is_meta for module in after.values() for p in module.parameters())


@pytest.mark.parametrize("kind", ["down", "up", "layer", "dense"])
def test_a_lora_of_another_model_is_refused(stored_wan: Path, lora: Path, kind: str) -> None:
    down, up = (f"transformer.{LAYER}.lora_{part}.weight" for part in "AB")
    expected: type[MotionMergeError] = ShapeError
    if kind == "layer":
        change(lora, down, to="transformer.blocks.99.lora_A.weight")
        change(lora, up, to="transformer.blocks.99.lora_B.weight")
        expected = CheckpointError
    else:
        changed = up if kind == "up" else down
        shape = (7, 2) if kind == "up" else (2, 7)
        change(lora, changed, to=torch.zeros(shape))
    choice = own_and_lora(lora) if kind == "dense" else from_loras([WeightedLora(lora, -0.25)])
    with pytest.raises(expected, match=r"blocks\.99" if kind == "layer" else LAYER) as caught:
        check(choice, stored_wan)
    with pytest.raises(expected) as later, choice.attach(load_pipeline(find_pipeline(stored_wan))):
        pass
    assert str(caught.value) == str(later.value)


@pytest.mark.parametrize("kind", ["name", "shape"])
def test_weights_of_another_model_are_refused(stored_wan: Path, weights: Path, kind: str) -> None:
    name = f"{LAYER}.bias"
    change(weights, name, to="other.bias" if kind == "name" else torch.zeros(5))
    choice = from_weights(weights)
    expected = CheckpointError if kind == "name" else ShapeError
    with pytest.raises(expected, match=r"other\.bias" if kind == "name" else LAYER) as caught:
        check(choice, stored_wan)
    with pytest.raises(expected) as later, choice.attach(load_pipeline(find_pipeline(stored_wan))):
        pass
    assert str(caught.value) == str(later.value)
