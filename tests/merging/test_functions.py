"""trim, ties and low_rank do what their formulas say."""

from __future__ import annotations

import pytest
import torch

from motionmerge.errors import RecipeError
from motionmerge.merging.algebra.functions import (
    elect_and_average,
    factorise,
    keep_largest,
    low_rank,
    ties,
    trim,
)
from motionmerge.merging.algebra.nodes import Checkpoint
from motionmerge.merging.merge import realise
from motionmerge.merging.recipes.bound import BoundRecipe
from motionmerge.merging.recipes.recipe import Recipe

from .conftest import same_bits


def noise(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("keep", [0.001, 0.2, 0.5, 1.0, 1])
def test_trim_keeps_the_largest_share_and_nothing_else(keep):
    tensor = noise(30, 40)
    kept = keep_largest(tensor, keep=keep)
    count = max(1, round(keep * tensor.numel()))
    assert int(kept.count_nonzero()) == count
    assert float(kept.abs().sum()) == pytest.approx(
        float(tensor.abs().flatten().topk(count)[0].sum())
    )
    assert torch.equal(kept[kept != 0], tensor[kept != 0])


def test_trim_keeps_the_first_of_equal_entries():
    tensor = torch.tensor([[1.0, -1.0, 1.0, 2.0, 0.5]])
    assert keep_largest(tensor, keep=0.6).tolist() == [[1.0, -1.0, 0.0, 2.0, 0.0]]


def test_ties_averages_the_values_with_the_elected_sign():
    tensors = [
        torch.tensor(values) for values in ([3.0, -1, 1, 0], [1.0, 2, -1, 5], [-2.0, 3, 0, 1])
    ]
    assert elect_and_average(tensors).tolist() == [2.0, 2.5, 0.0, 3.0]


def test_ties_of_vectors_that_agree_is_their_mean():
    first = noise(4, 5).abs()
    assert torch.equal(elect_and_average([first, 3 * first]), 2 * first)


@pytest.mark.parametrize("shape", [(12, 7), (7, 12), (9, 9)])
@pytest.mark.parametrize("rank", [1, 4])
def test_a_factorisation_is_the_truncated_singular_value_decomposition(shape, rank):
    matrix = noise(*shape)
    factors = factorise(matrix, rank=rank)
    u, s, v = torch.linalg.svd(matrix, full_matrices=False)
    best = u[:, :rank] @ torch.diag(s[:rank]) @ v[:rank]
    torch.testing.assert_close(factors.up @ factors.down, best, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(factors.energies.float(), s.square(), atol=1e-4, rtol=1e-4)


def test_a_matrix_of_low_rank_is_found_again():
    matrix = noise(20, 3) @ noise(3, 30, seed=1)
    factors = factorise(matrix, rank=10)
    assert torch.isfinite(factors.up).all() and torch.isfinite(factors.down).all()
    torch.testing.assert_close(factors.up @ factors.down, matrix, atol=1e-4, rtol=1e-4)
    assert torch.isfinite(factorise(torch.zeros(3, 4), rank=2).down).all()


def test_one_dimensional_tensors_are_kept_whole(pair, states):
    base, tuned = pair
    vector = tuned - base
    plain = (base + vector).evaluate("unet.conv_in.bias")
    for thinned in (trim(vector, keep=0.1), low_rank(vector, rank=1)):
        assert same_bits((base + thinned).evaluate("unet.conv_in.bias"), plain)


def test_low_rank_takes_a_kernel_as_a_matrix(pair):
    base, tuned = pair
    name = "unet.down_stages.0.temporal_conv.conv1.2.weight"
    difference = (base + (tuned - base)).evaluate(name) - base.evaluate(name)
    merged = (base + low_rank(tuned - base, rank=2)).evaluate(name) - base.evaluate(name)
    assert merged.shape == difference.shape
    singular = torch.linalg.svdvals(merged.flatten(1))
    assert singular[2] < 1e-5 < singular[1]


def test_everything_at_once_is_parsed_printed_and_realised(folder):
    formula = (
        'base + 0.5 * ties(trim(tuned - base, keep=0.5), only(tuned - base, "temporal"), '
        "-0.1 * low_rank(tuned - base, rank=3), keep=0.9)"
    )
    text = (folder / "recipe.yaml").read_text().split("experts:")[0]
    recipe = Recipe.parse(f"{text}experts:\n  merged: '{formula}'\n", folder=folder)
    assert str(recipe.experts["merged"]) == formula
    assert Recipe.parse(recipe.print()) == recipe
    merged = realise(recipe)["merged"]
    direct = BoundRecipe.of(recipe).experts["merged"].tensors()
    assert all(same_bits(merged[name], direct[name]) for name in direct)
    base = Checkpoint.load(folder / "base.safetensors").tensors()
    assert any(not torch.equal(merged[name], base[name]) for name in base)


WRONG = {
    "trim(tuned - base, keep=0)": r"not a number in \(0, 1\]",
    "trim(tuned, keep=0.5)": "got the checkpoint `tuned`, not a task vector",
    "trim(0.5, keep=0.5)": "got the number 0.5, not a task vector",
    "ties(tuned - base, keep=0.5)": r"takes 2 or more positional argument\(s\), got 1",
    "ties(tuned - base, 3, keep=0.5)": "not a task vector",
    "low_rank(tuned - base, rank=0)": "not a positive integer",
    "low_rank(tuned - base, rank=1.5)": "not a positive integer",
    "low_rank(tuned - base)": "needs `rank`",
    'lora("x.safetensors")': "Write `lora\\(file, scale\\)`",
    "lora(tuned - base, 1)": "not a file",
    'lora("x.safetensors", tuned)': "not a number",
}


@pytest.mark.parametrize(("call", "message"), WRONG.items())
def test_a_wrong_call_is_refused_with_a_caret(call, message):
    text = f"inputs: {{base: a, tuned: b}}\nexperts:\n  merged: 'base + {call}'\n"
    with pytest.raises(RecipeError, match=message) as caught:
        Recipe.parse(text)
    assert "^" in str(caught.value)


def test_ties_wants_two_task_vectors(pair):
    with pytest.raises(RecipeError, match="two or more"):
        ties(pair[1] - pair[0], keep=0.5)
