"""DynamiCrafter's official names in merging, held against its conversion."""

import pytest
import torch

from motionmerge import Checkpoint
from motionmerge.errors import CheckpointError
from motionmerge.merging.inputs.resolvers import resolve
from motionmerge.merging.names.dynamicrafter import dynamicrafter_style
from motionmerge.merging.names.layout import to_theirs
from motionmerge.merging.names.original import family_of_names
from motionmerge.models.dynamicrafter.conversion import (
    convert_unet_state_dict,
    unconvert_unet_state_dict,
)

from .test_original_names import assert_equal, made, shapes_of


@pytest.fixture(scope="module")
def state():
    """The pocket model: `unet.` and `image_projector.`."""
    return Checkpoint.load(resolve("pocket:base"), name="base").tensors()


def official(state):
    """Turn the pocket model into an official file's tensors, by the conversion of the models."""
    unet = {name.removeprefix("unet."): t for name, t in state.items() if name.startswith("unet.")}
    return {
        name if name.startswith(("queries", "qformer")) else f"model.diffusion_model.{name}": t
        for name, t in unconvert_unet_state_dict(unet).items()
    }


def official_layout(state):
    converted = to_theirs(shapes_of(state), dynamicrafter_style(state))
    assert not converted.left
    return converted.layout


def test_the_layout_is_that_of_the_conversion(state):
    unet = {name.removeprefix("unet."): t for name, t in state.items() if name.startswith("unet.")}
    layout = official_layout(unet)
    wanted = unconvert_unet_state_dict(unet)
    assert_equal(made(layout, unet), wanted)
    assert family_of_names(layout) == family_of_names(state) == "dynamicrafter"
    assert_equal(convert_unet_state_dict(wanted), unet)


def test_an_official_file_and_ours_are_one_name_space(state):
    unet = {name: tensor for name, tensor in state.items() if name.startswith("unet.")}
    generator = torch.Generator().manual_seed(0)
    tuned = {
        name: t + torch.randn(t.shape, generator=generator) if t.is_floating_point() else t
        for name, t in unet.items()
    }
    base = Checkpoint.from_tensors(unet, name="base")
    plain = Checkpoint.from_tensors(tuned, name="tuned")
    theirs = Checkpoint.from_tensors(official(tuned), name="tuned")
    assert_equal((base + 0.5 * (theirs - base)).tensors(), (base + 0.5 * (plain - base)).tensors())
    start = Checkpoint.from_tensors(official(unet), name="base")
    assert_equal(
        (start + 0.5 * (plain - start)).tensors(),
        official((base + 0.5 * (plain - base)).tensors()),
    )


def test_a_learned_scale_that_ours_has_folded_in_is_not_passed_over(state):
    unet = {name: tensor for name, tensor in state.items() if name.startswith("unet.")}
    theirs = official(unet)
    block = next(name for name in theirs if name.endswith(".attn2.to_v_ip.weight"))
    theirs[block.replace("to_v_ip.weight", "alpha")] = torch.tensor(0.1)
    base = Checkpoint.from_tensors(unet, name="base")
    with pytest.raises(CheckpointError, match="no tensor name in common") as caught:
        (base + (Checkpoint.from_tensors(theirs, name="tuned") - base)).tensors()
    assert "motionmerge convert" in caught.value.fix


def test_the_image_projector_comes_along(state):
    bare = {name.removeprefix("unet."): t for name, t in state.items()}
    layout = official_layout(bare)
    assert "image_proj_model.layers.0.0.to_kv.weight" in layout
    theirs = made(layout, bare)
    base = Checkpoint.from_tensors(state, name="base")
    again = Checkpoint.from_tensors(theirs, name="tuned")
    assert_equal((base + (again - base)).tensors(), state)
