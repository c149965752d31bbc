"""A LoRA where the weights of a model are expected is named and refused, and the reverse."""

import pytest
import torch
from safetensors.torch import save_file

from motionmerge import Checkpoint, lora
from motionmerge.errors import CheckpointError
from motionmerge.merging.compare import compare
from motionmerge.merging.in_memory import realise
from motionmerge.merging.lora.detection import lora_matrices
from motionmerge.merging.merge import merge
from motionmerge.merging.recipes.recipe import Recipe

LAYER = "blocks.0.attn1.to_q"
WEIGHT = f"{LAYER}.weight"
WHOLE = {WEIGHT: torch.zeros(6, 6), "proj_out.weight": torch.zeros(6, 6)}

STYLES = {
    "peft": (f"transformer.{LAYER}.lora_A.weight", f"transformer.{LAYER}.lora_B.weight"),
    "adapter": (f"{LAYER}.lora_A.my-adapter.weight", f"{LAYER}.lora_B.my-adapter.weight"),
    "kohya": ("lora_unet_blocks_0.lora_down.weight", "lora_unet_blocks_0.lora_up.weight"),
    "diffusers, old": (f"{LAYER}.lora.down.weight", f"{LAYER}.lora.up.weight"),
    "processor": (f"{LAYER}_lora.down.weight", f"{LAYER}_lora.up.weight"),
    "loha": (f"{LAYER}.hada_w1_a", f"{LAYER}.hada_w1_b"),
    "lokr": (f"{LAYER}.lokr_w1", f"{LAYER}.lokr_w2_a"),
}


def a_lora(style: str) -> dict[str, torch.Tensor]:
    down, up = STYLES[style]
    return {down: torch.ones(1, 6), up: torch.ones(6, 1)}


@pytest.mark.parametrize("style", STYLES)
def test_lora_matrices_are_known_by_their_names_in_every_style(style):
    assert lora_matrices(a_lora(style)) == list(STYLES[style])


@pytest.mark.parametrize(
    "name",
    [
        "blocks.0.attn2.alpha",  # DynamiCrafter 256 learns the strength of its image branch
        "exploration.lora.weight",
        "blocks.0.flora_A.weight",
        "text_encoder.layers.0.mlp.down_proj.weight",
        "up_blocks.0.resnets.0.conv1.weight",
    ],
)
def test_names_of_whole_models_are_not_taken_for_loras(name):
    assert lora_matrices([name]) == []


@pytest.mark.parametrize("style", STYLES)
def test_a_lora_is_no_checkpoint_of_a_difference(style, tmp_path):
    for name in ("base", "tuned"):
        save_file(a_lora(style), tmp_path / f"{name}.safetensors")
    (tmp_path / "r.yaml").write_text(
        "inputs: {base: base.safetensors, tuned: tuned.safetensors}\n"
        "experts: {moved: base - 0.25 * (tuned - base)}\n"
    )
    with pytest.raises(CheckpointError, match="is a LoRA, not the weights of a model"):
        merge(tmp_path / "r.yaml", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_lora_beside_a_checkpoint_is_refused_in_memory_too():
    recipe = Recipe.parse(
        "inputs: {base: 'memory:base', tuned: 'memory:tuned'}\n"
        "experts: {moved: base - 0.25 * (tuned - base)}\n"
    )
    with pytest.raises(CheckpointError, match="`tuned` is a LoRA"):
        realise(recipe, inputs={"base": WHOLE, "tuned": a_lora("peft")}, missing="keep")


def test_a_checkpoint_with_its_adapters_still_in_it_is_named(tmp_path):
    wrapped = {
        f"{LAYER}.base_layer.weight": torch.zeros(6, 6),
        f"{LAYER}.lora_A.default.weight": torch.ones(1, 6),
        f"{LAYER}.lora_B.default.weight": torch.ones(6, 1),
        "proj_out.weight": torch.ones(6, 6),
    }
    base = Checkpoint.from_tensors(WHOLE, name="base")
    tuned = Checkpoint.from_tensors(wrapped, name="tuned")
    with pytest.raises(CheckpointError, match="adapters still in it") as caught:
        (base - 1.0 * (tuned - base)).tensors()
    assert "merge_and_unload" in caught.value.fix
    with pytest.raises(CheckpointError, match="adapters still in it"):
        compare(base, tuned)


def test_whole_weights_are_no_lora():
    base = Checkpoint.from_tensors(WHOLE, name="base")
    with pytest.raises(CheckpointError, match="no LoRA"):
        (base + lora(WHOLE, 1.0)).tensors()


def test_a_lora_is_still_added_to_a_checkpoint():
    base = Checkpoint.from_tensors(WHOLE, name="base")
    added = (base + lora(a_lora("peft"), 1.0)).tensors()
    assert torch.equal(added[WEIGHT], torch.ones(6, 6))
