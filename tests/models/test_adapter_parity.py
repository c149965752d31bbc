"""The text-to-temporal adapter against the official one, and its start as the identity."""

from __future__ import annotations

import pytest
import torch

from motionmerge.errors import ConfigError, ShapeError
from motionmerge.models.dynamicrafter import DynamiCrafterUNet, convert_unet_state_dict
from motionmerge.models.dynamicrafter.official_config import unet_config_from_shapes

from .reference_weights import official_keys, official_weights, vectors

CASES = ("b1_perframe", "b2_shared")
SMALL = {
    "block_out_channels": (32, 32),
    "attention_levels": (True, False),
    "layers_per_block": 1,
    "attention_head_dim": 16,
    "cross_attention_dim": 64,
}


@pytest.fixture(scope="module")
def unet() -> DynamiCrafterUNet:
    shapes = {name: tuple(shape) for name, shape in official_keys("unet_adapter")["shapes"].items()}
    unet = DynamiCrafterUNet(**unet_config_from_shapes(shapes))
    unet.load_state_dict(convert_unet_state_dict(official_weights("unet_adapter")))
    return unet.eval().requires_grad_(False)


def small_unet() -> DynamiCrafterUNet:
    torch.manual_seed(0)
    return DynamiCrafterUNet(**SMALL).eval().requires_grad_(False)


def random_inputs(*, frames: int = 4) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "sample": torch.randn(2, 8, frames, 4, 4, generator=generator),
        "timestep": torch.tensor([500, 20]),
        "encoder_hidden_states": torch.randn(2, 77 + 16, 64, generator=generator),
        "frame_rate": torch.tensor([24, 8]),
    }


def test_the_temporal_context_equals_the_official_one(unet: DynamiCrafterUNet) -> None:
    expected = vectors("unet_adapter")["b1_perframe.temporal_context"]
    context = unet.temporal_adapter(vectors("unet_adapter")["b1_perframe.text"], 16)
    torch.testing.assert_close(context, expected, atol=2e-5, rtol=0)


@pytest.mark.parametrize("case", CASES)
def test_the_unet_with_adapter_equals_the_official_one(unet: DynamiCrafterUNet, case: str) -> None:
    data = {
        name.removeprefix(f"{case}."): value
        for name, value in vectors("unet_adapter").items()
        if name.startswith(case)
    }
    sample = torch.cat([data["z"], data["c_concat"]], dim=1)
    out = unet(sample, data["timesteps"], data["context"], data["fs"], data["temporal_context"])
    torch.testing.assert_close(out.sample, data["out"], atol=2e-5, rtol=0)


@pytest.mark.parametrize("frames", [1, 4, 16])
def test_a_new_adapter_is_the_identity_exactly(frames: int) -> None:
    unet, inputs = small_unet(), random_inputs(frames=frames)
    before = unet(**inputs).sample
    unet.add_temporal_adapter(num_frames=16)
    assert torch.equal(unet(**inputs).sample, before)


def test_a_new_adapter_depends_on_its_seed_only() -> None:
    first, same, other = small_unet(), small_unet(), small_unet()
    first.add_temporal_adapter(seed=1)
    torch.manual_seed(99)
    same.add_temporal_adapter(seed=1)
    other.add_temporal_adapter(seed=2)
    names = first.temporal_adapter.state_dict().keys()
    weights = [unet.temporal_adapter.state_dict() for unet in (first, same, other)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in names)
    assert not torch.equal(weights[0]["queries"], weights[2]["queries"])


def test_the_context_is_computed_from_the_text_tokens_alone() -> None:
    unet, inputs = small_unet(), random_inputs()
    unet.add_temporal_adapter(num_frames=4)
    for transformer in unet.temporal_transformers():
        torch.nn.init.normal_(transformer.fusion.proj.weight, std=0.05)
    text = inputs["encoder_hidden_states"][:, :77]
    context = unet.temporal_adapter(text, 4)
    given = unet(**inputs, temporal_context=context).sample
    assert torch.equal(unet(**inputs).sample, given)
    assert not torch.allclose(unet(**inputs, temporal_context=0 * context).sample, given)


def test_an_adapter_is_saved_and_loaded_with_the_unet(tmp_path) -> None:
    unet, inputs = small_unet(), random_inputs()
    unet.add_temporal_adapter(num_frames=4)
    torch.nn.init.normal_(unet.temporal_in.fusion.proj.weight, std=0.05)
    unet.save_pretrained(tmp_path)
    loaded = DynamiCrafterUNet.from_pretrained(tmp_path).eval().requires_grad_(False)
    torch.testing.assert_close(loaded(**inputs).sample, unet(**inputs).sample)
    queries = loaded.temporal_adapter.queries
    assert torch.equal(queries, unet.temporal_adapter.queries)


def test_a_second_adapter_is_refused() -> None:
    unet = small_unet()
    unet.add_temporal_adapter()
    with pytest.raises(ConfigError, match="has a temporal adapter already"):
        unet.add_temporal_adapter()


def test_a_context_is_refused_by_a_unet_without_adapter() -> None:
    with pytest.raises(ShapeError, match="no temporal adapter"):
        small_unet()(**random_inputs(), temporal_context=torch.zeros(2, 4, 64))


def test_a_context_of_the_wrong_length_is_refused() -> None:
    unet = small_unet()
    unet.add_temporal_adapter()
    with pytest.raises(ShapeError, match="`temporal_context` has shape"):
        unet(**random_inputs(frames=4), temporal_context=torch.zeros(2, 16, 64))
