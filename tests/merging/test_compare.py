"""A comparison adds up to what torch says about the whole."""

from __future__ import annotations

import json

import pytest
import torch

from motionmerge.errors import CheckpointError, ConfigError
from motionmerge.merging.algebra.nodes import Checkpoint
from motionmerge.merging.compare import compare, draw_comparison


def flat(state):
    return torch.cat([v.flatten().double() for v in state.values() if v.ndim])


def test_the_groups_add_up_to_the_whole(pair, states):
    comparison = compare(*pair)
    base, tuned = map(flat, states)
    total = comparison.total
    assert total.norm_difference == pytest.approx(float((tuned - base).norm()))
    assert total.relative == pytest.approx(float((tuned - base).norm() / base.norm()))
    assert total.cosine == pytest.approx(float(torch.cosine_similarity(base, tuned, dim=0)))
    assert set(comparison.groups) == {
        "temporal", "spatial", "cross_attention", "image_projector", "residual",
    }  # fmt: skip
    assert sum(group.parameters for group in comparison.groups.values()) == base.numel()


def test_equal_checkpoints_have_no_change(pair):
    comparison = compare(pair[0], pair[0])
    assert comparison.changed == () and comparison.total.relative == 0
    assert comparison.total.cosine == pytest.approx(1)


def test_changed_tensors_are_listed_the_largest_change_first(pair, states):
    base, _ = states
    name, other = "unet.conv_in.weight", "unet.conv_in.bias"
    changed = {**base, name: base[name] * 1.5, other: base[other] * 1.1}
    second = Checkpoint.from_tensors(changed, name="changed")
    assert compare(pair[0], second).changed == (name, other)


def test_from_a_base_opposite_task_vectors_have_cosine_minus_one(pair):
    base, tuned = pair
    comparison = compare(tuned, base - (tuned - base), base=base)
    assert comparison.total.cosine == pytest.approx(-1, abs=1e-4)
    assert "both measured from base" in str(comparison)


def test_one_sided_names_and_other_shapes_are_listed(pair, states):
    base, _ = states
    changed = {name: value for name, value in base.items() if "conv_in.bias" not in name}
    changed["unet.conv_in.weight"] = torch.ones(2, 2)
    changed["extra"] = torch.ones(1)
    comparison = compare(pair[0], Checkpoint.from_tensors(changed, name="b"))
    assert comparison.only_first == ("unet.conv_in.bias",)
    assert comparison.only_second == ("extra",)
    assert comparison.other_shape == ("unet.conv_in.weight",)


def test_nothing_in_common_is_an_error(pair):
    with pytest.raises(CheckpointError, match="no tensor name in common"):
        compare(pair[0], Checkpoint.from_tensors({"x": torch.ones(2)}, name="other"))


@pytest.mark.parametrize(
    ("second", "words"),
    [
        ({"a.weight": torch.ones(3, 2)}, r"`a.weight` is \[2, 3\] and \[3, 2\]"),
        ({"steps": torch.tensor(1)}, r"others are no weights"),
    ],
)
def test_tensors_of_which_none_can_be_compared_are_an_error(second, words):
    first = {"a.weight": torch.ones(2, 3), "steps": torch.tensor(1)}
    sides = [Checkpoint.from_tensors(one, name="x") for one in (first, second)]
    with pytest.raises(CheckpointError, match=words) as caught:
        compare(*sides)
    assert caught.value.fix


def test_a_comparison_is_plain_json_even_from_zero(states):
    base, _ = states
    zero = {name: torch.zeros_like(value) for name, value in base.items()}
    comparison = compare(
        Checkpoint.from_tensors(zero, name="a"), Checkpoint.from_tensors(base, name="b")
    )
    found = json.loads(json.dumps(comparison.to_dict(), allow_nan=False))
    assert found["total"]["relative"] is None and found["total"]["cosine"] is None


@pytest.mark.parametrize("name", ["plot.png", "plot.svg"])
def test_a_comparison_is_drawn(pair, tmp_path, name):
    draw_comparison(compare(*pair), tmp_path / name)
    assert (tmp_path / name).stat().st_size > 1000


def test_another_ending_is_refused(pair, tmp_path):
    with pytest.raises(ConfigError, match="Cannot draw"):
        draw_comparison(compare(*pair), tmp_path / "plot.pdf")


def lora_of(down, up, *, path="diffusion_model.blocks.0.self_attn.q", alpha=None):
    file = {f"{path}.lora_down.weight": down, f"{path}.lora_up.weight": up}
    return file if alpha is None else {**file, f"{path}.alpha": torch.tensor(alpha)}


def matrices(seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, 8, generator=generator), torch.randn(8, 2, generator=generator)


def compared(first, second, *, base=None):
    return compare(
        Checkpoint.from_tensors(first, name="first"),
        Checkpoint.from_tensors(second, name="second"),
        base=None if base is None else Checkpoint.from_tensors(base, name="base"),
    )


def test_a_lora_with_turned_factors_is_the_same_lora():
    down, up = matrices(1)
    turn = torch.linalg.qr(matrices(3)[0][:, :2])[0]
    found = compared(lora_of(down, up), lora_of(turn @ down, up @ turn.T))
    assert found.total.relative < 1e-6
    assert found.total.cosine == pytest.approx(1.0)


def test_loras_are_compared_by_products_with_alpha_over_rank():
    (down, up), (other_down, other_up) = matrices(1), matrices(2)
    found = compared(lora_of(down, up, alpha=2.0), lora_of(other_down, other_up, alpha=8.0)).total
    first, second = up @ down, 4 * other_up @ other_down
    assert found.norm_difference == pytest.approx(float((first - second).norm()), rel=1e-5)
    assert found.dot == pytest.approx(float((first * second).sum()), rel=1e-5)


@pytest.mark.parametrize("with_base", [False, True])
def test_loras_in_two_styles_of_names_find_each_other(with_base):
    down, up = matrices(1)
    other = lora_of(down, 2 * up, path="transformer.blocks.0.attn1.to_q")
    base = {"blocks.0.attn1.to_q.weight": torch.zeros(8, 8)} if with_base else None
    found = compared(lora_of(down, up), other, base=base)
    assert not found.only_first + found.only_second
    assert found.total.relative == pytest.approx(1.0, rel=1e-5)


def test_loras_that_change_no_layer_in_common_are_named_by_a_layer_of_each():
    one, other = "blocks.0.attn1.to_q", "blocks.0.attn1.to_k"
    with pytest.raises(CheckpointError, match="no layer in common") as caught:
        compared(
            *(lora_of(*matrices(1), path=f"transformer.{path}") for path in (one, other)),
        )
    assert one in str(caught.value) and other in str(caught.value)


def test_a_lora_and_a_checkpoint_are_not_compared():
    down, up = matrices(1)
    with pytest.raises(CheckpointError, match="`second` is a LoRA"):
        compared({"blocks.0.attn1.to_q.weight": torch.zeros(8, 8)}, lora_of(down, up))


def test_layers_that_one_lora_alone_has_are_listed():
    down, up = matrices(1)
    text = {
        "text_encoder.layers.0.q.lora_A.weight": down,
        "text_encoder.layers.0.q.lora_B.weight": up,
    }
    more = lora_of(down, up, path="diffusion_model.blocks.1.self_attn.q")
    found = compared({**lora_of(down, up), **text}, {**lora_of(down, up), **more})
    assert found.only_first == ("text_encoder.layers.0.q",)
    assert found.only_second == ("diffusion_model.blocks.1.self_attn.q",)
