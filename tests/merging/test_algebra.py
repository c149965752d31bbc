"""Expressions are typed, lazy, immutable, and evaluate to what their formula says."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from motionmerge.errors import CheckpointError, RecipeError, ShapeError
from motionmerge.io.weights import open_weights, save_weights
from motionmerge.merging.algebra.nodes import Checkpoint, TaskVector
from motionmerge.merging.algebra.sparsify import dare

from .conftest import make_pair, same_bits

NOWHERE = Checkpoint.load("/nowhere/base.safetensors")
ELSEWHERE = Checkpoint.load("/nowhere/tuned.safetensors")


def test_a_difference_of_checkpoints_is_a_task_vector_and_their_sum_with_one_a_checkpoint():
    motion = ELSEWHERE - NOWHERE
    for vector in (motion, 0.5 * motion, motion * 2, -motion, motion + motion, motion - motion):
        assert isinstance(vector, TaskVector)
        assert isinstance(NOWHERE + vector, Checkpoint)
        assert isinstance(NOWHERE - vector, Checkpoint)


@pytest.mark.parametrize(
    "wrong",
    [
        lambda base, motion: base + base,
        lambda base, motion: 2 * base,
        lambda base, motion: base * 0.5,
        lambda base, motion: -base,
        lambda base, motion: motion + base,
        lambda base, motion: motion - base,
        lambda base, motion: motion * motion,
        lambda base, motion: motion + 1,
        lambda base, motion: 1 - motion,
        lambda base, motion: motion / 2,
        lambda base, motion: base + 1.0,
        lambda base, motion: True * motion,
        lambda base, motion: float("nan") * motion,
        lambda base, motion: "2" * motion,
        lambda base, motion: dare(base, drop_rate=0.5, seed=0),
    ],
)
def test_a_wrong_sum_is_refused_before_any_file_is_opened(wrong):
    with pytest.raises(RecipeError, match="Fix:"):
        wrong(NOWHERE, ELSEWHERE - NOWHERE)


def test_an_expression_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        (ELSEWHERE - NOWHERE).minuend = NOWHERE


def test_a_missing_file_is_noticed_only_when_it_is_needed():
    with pytest.raises(CheckpointError, match="base"):
        NOWHERE.evaluate("weight")


def test_the_result_is_the_formula_in_fp32(pair, states):
    base, tuned = states
    merged = (pair[0] - 0.25 * (pair[1] - pair[0])).tensors()
    for name, value in base.items():
        expected = value + (tuned[name] - value) * 0.25 * -1 if value.ndim else value
        assert same_bits(merged[name], expected)


def test_half_precision_is_computed_in_fp32_and_rounded_once():
    for dtype in (torch.bfloat16, torch.float16):
        base, tuned = make_pair(dtype)
        first = Checkpoint.from_tensors(base, name="base")
        second = Checkpoint.from_tensors(tuned, name="tuned")
        merged = (first + 0.1 * (second - first) + 0.2 * (second - first)).tensors()
        for name in ("unet.conv_in.weight", "unet.conv_in.bias"):
            step = tuned[name].float() - base[name].float()
            expected = (base[name].float() + 0.1 * step + 0.2 * step).to(dtype)
            assert same_bits(merged[name], expected)


def test_the_identity_gives_back_the_bytes(pair, states):
    odd = {"negative zero": torch.tensor([-0.0, 1e-45]), "scalar": torch.tensor(2.5)}
    odd |= {"counter": torch.tensor([1, 2]), "double": torch.randn(3, dtype=torch.float64)}
    for state in (*states, odd):
        merged = Checkpoint.from_tensors(state, name="base").tensors()
        assert list(merged) == list(state)
        assert all(same_bits(merged[name], state[name]) for name in state)


def test_integers_and_scalars_come_from_the_checkpoint_at_the_front(pair, states):
    base, tuned = states
    motion = pair[1] - pair[0]
    for anchor, state in zip(pair, (base, tuned), strict=True):
        merged = (anchor + 3.0 * motion).tensors()
        assert same_bits(merged["unet.num_updates"], state["unet.num_updates"])
        assert same_bits(merged["unet.scale"], state["unet.scale"])


def test_names_and_order_follow_the_checkpoint_at_the_front(states):
    base, tuned = states
    backwards = dict(reversed(tuned.items()))
    first = Checkpoint.from_tensors(base, name="base")
    second = Checkpoint.from_tensors(backwards, name="tuned")
    assert list((first + (second - first)).tensors()) == list(base)
    assert list((second + (second - first)).tensors()) == list(backwards)


def test_merging_does_not_touch_the_input_tensors(pair, states):
    before = {name: value.clone() for name, value in states[0].items()}
    merged = (pair[0] + dare(2 * (pair[1] - pair[0]), drop_rate=0.5, seed=0)).tensors()
    for value in merged.values():
        value.zero_()
    assert all(same_bits(states[0][name], before[name]) for name in before)


def test_a_shape_mismatch_names_both_shapes(states):
    base, tuned = states
    wrong = tuned | {"unet.conv_in.bias": torch.zeros(1)}
    first = Checkpoint.from_tensors(base, name="base")
    second = Checkpoint.from_tensors(wrong, name="tuned")
    with pytest.raises(ShapeError, match=r"\[8\] in `base` but \[1\] in `tuned`"):
        (first + (second - first)).tensors()


def test_quantised_weights_on_one_side_are_refused(states):
    base, tuned = states
    wrong = tuned | {"unet.conv_in.bias": torch.zeros(8, dtype=torch.int8)}
    first = Checkpoint.from_tensors(base, name="base")
    second = Checkpoint.from_tensors(wrong, name="tuned")
    with pytest.raises(ShapeError, match="int8"):
        (first + (second - first)).tensors()


def test_a_saved_expression_is_what_it_evaluates_to(pair, tmp_path):
    expression = pair[0] + 0.5 * dare(pair[1] - pair[0], drop_rate=0.5, seed=3)
    expression.save(tmp_path / "merged.safetensors")
    expected = expression.tensors()
    with open_weights(tmp_path / "merged.safetensors") as reader:
        assert reader.metadata["motionmerge.formula"] == str(expression)
        assert all(same_bits(reader.read(name), expected[name]) for name in expected)
    assert same_bits(expression.evaluate("unet.conv_in.weight"), expected["unet.conv_in.weight"])


def test_a_value_too_large_for_the_output_dtype_is_refused(tmp_path):
    big = Checkpoint.from_tensors({"w": torch.full((2, 2), 1e6)}, name="big")
    with pytest.raises(CheckpointError, match="fp16"):
        big.save(tmp_path / "small.safetensors", dtype="fp16")
    assert not list(tmp_path.iterdir())


def test_a_pipeline_folder_opens_as_one_checkpoint(tmp_path, states):
    base, _ = states
    for module in ("unet", "image_projector"):
        tensors = {
            name.removeprefix(f"{module}."): value
            for name, value in base.items()
            if name.startswith(f"{module}.")
        }
        save_weights(tmp_path / module / "diffusion_pytorch_model.safetensors", tensors)
    (tmp_path / "vae").mkdir()
    merged = Checkpoint.load(tmp_path).tensors()
    assert merged.keys() == base.keys()
    assert all(same_bits(merged[name], base[name]) for name in base)


def test_a_loaded_checkpoint_is_called_after_its_file():
    assert str(Checkpoint.load(Path("a/my-model.v2.safetensors"))) == "my_model_v2"
