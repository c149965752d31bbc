"""What is trained: groups by name, in fp32, whole or as LoRAs that every reader can load."""

from __future__ import annotations

import operator

import pytest
import torch

from motionmerge.errors import ConfigError
from motionmerge.parameter_groups import DYNAMICRAFTER, group_of
from motionmerge.switching.expert_bank import experts
from motionmerge.training.denoisers.condition import DenoiserCondition
from motionmerge.training.denoisers.dynamicrafter import DynamiCrafterDenoiser
from motionmerge.training.parameters import LoraShape, choose_parameters, trained_state

from ..tiny.dynamicrafter import NUM_FRAMES, NUM_TOKENS, WIDTH, tiny_pipeline
from ..tiny.loras import with_weights


def denoiser_of(pipeline) -> DynamiCrafterDenoiser:
    return DynamiCrafterDenoiser(pipeline.unet, pipeline.image_projector)


@pytest.fixture
def pipeline():
    made = tiny_pipeline()
    made.unet.add_temporal_adapter(num_frames=NUM_FRAMES, num_heads=2, head_dim=4)
    return made


def predicted(denoiser: DynamiCrafterDenoiser) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)

    def drawn(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(denoiser.unet.dtype)

    condition = DenoiserCondition(
        latents=drawn(1, 4, NUM_FRAMES, 4, 4),
        prompt_embeds=drawn(1, NUM_TOKENS, WIDTH),
        image_embeds=drawn(1, 17, WIDTH),
        frame_rate=torch.tensor([8]),
        tokens_kept=torch.ones(1),
        token_noise=torch.zeros(1, 1, 1),
    )
    noisy = drawn(1, 4, NUM_FRAMES, 4, 4)
    if torch.is_grad_enabled():
        noisy.requires_grad_()
    return denoiser(noisy, torch.tensor([500]), condition)


@pytest.mark.parametrize(
    ("trains", "groups"),
    {
        "adapter": {"adapter", "temporal"},
        "adapter-only": {"adapter"},
        "temporal": {"temporal"},
        "spatial": {"spatial"},
        "re:attn2": {"cross_attention", "temporal"},
        "*.attn2.processor.*": {"cross_attention"},
    }.items(),
)
def test_groups_and_patterns_are_those_of_recipes(pipeline, trains, groups):
    denoiser = denoiser_of(pipeline)
    trained = choose_parameters(denoiser, DYNAMICRAFTER, trains)
    assert {group_of(name) for name in trained.names} == groups
    assert sum(trained.counts.values()) == sum(one.numel() for one in trained.parameters)
    named = dict(denoiser.named_parameters())
    assert all(map(operator.is_, trained.parameters, map(named.get, trained.names)))
    assert {name for name, one in named.items() if one.requires_grad} == set(trained.names)


def test_all_trains_the_image_projector_as_well(pipeline):
    denoiser = denoiser_of(pipeline)
    trained = choose_parameters(denoiser, DYNAMICRAFTER, "all")
    assert len(trained.names) == len(list(denoiser.parameters()))
    assert trained.counts["image_projector"] > 0


def test_trained_parameters_of_a_bf16_model_are_fp32_and_all_have_gradients(pipeline):
    denoiser = denoiser_of(pipeline).to(torch.bfloat16)
    trained = choose_parameters(denoiser, DYNAMICRAFTER)
    dtypes = {one.dtype for one in trained.parameters}
    frozen = {one.dtype for one in denoiser.parameters() if not one.requires_grad}
    assert (dtypes, frozen) == ({torch.float32}, {torch.bfloat16})
    with torch.autocast("cpu", torch.bfloat16):
        predicted(denoiser).square().mean().backward()
    assert all(one.grad is not None and one.grad.isfinite().all() for one in trained.parameters)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_lora_starts_as_nothing_and_reaches_every_layer(dtype):
    # torch rounds otherwise where a weight needs gradients.
    denoiser = denoiser_of(tiny_pipeline()).to(dtype).requires_grad_(False)
    before = predicted(denoiser)
    trained = choose_parameters(denoiser, DYNAMICRAFTER, "all", lora=LoraShape(rank=2))
    layers = {name.partition(".lora_")[0] for name in trained.names}
    assert "unet.down_stages.0.temporal_conv.conv1.2" in layers
    assert {one.dtype for one in trained.parameters} == {torch.float32}
    after = predicted(denoiser)
    assert torch.equal(after, before)
    after.float().square().mean().backward()
    assert all(one.grad is not None for one in trained.parameters)


def test_a_lora_reaches_the_fusion_layers_of_the_adapter(pipeline):
    denoiser = denoiser_of(pipeline)
    before = predicted(denoiser)
    trained = choose_parameters(denoiser, DYNAMICRAFTER, "adapter-only", lora=LoraShape(rank=2))
    after = predicted(denoiser)
    # A plain fusion layer computes its two halves apart.
    torch.testing.assert_close(after, before, atol=1e-5, rtol=1e-5)
    after.square().mean().backward()
    assert all(one.grad is not None for one in trained.parameters)
    assert any(".fusion." in name for name in trained.names)


def test_the_first_matrices_of_a_lora_are_a_function_of_the_seed(pipeline):
    drawn = []
    for seed in (1, 1, 2):
        denoiser = denoiser_of(tiny_pipeline())
        trained = choose_parameters(
            denoiser, DYNAMICRAFTER, "temporal", lora=LoraShape(), seed=seed
        )
        drawn.append(trained.parameters[0].detach())
        torch.rand(1)
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])


def test_experts_read_a_trained_lora_back(pipeline):
    denoiser = denoiser_of(pipeline)
    shape = LoraShape(rank=2, alpha=3)
    trained = choose_parameters(denoiser, DYNAMICRAFTER, "adapter", lora=shape)
    with torch.no_grad():
        for one in trained.parameters:
            one.normal_(std=0.3)
        tuned = predicted(denoiser)
        state = trained_state(denoiser, trained)
        fresh = tiny_pipeline()
        fresh.unet.add_temporal_adapter(num_frames=NUM_FRAMES, num_heads=2, head_dim=4)
        plain = predicted(denoiser_of(fresh))
        with experts(fresh, **with_weights(state, {"all": 1.0})):
            read = predicted(denoiser_of(fresh))
    torch.testing.assert_close(read, tuned, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(tuned, plain, atol=1e-2)


def test_whole_parameters_are_kept_under_the_denoisers_own_names(pipeline):
    denoiser = denoiser_of(pipeline).to(torch.bfloat16)
    state = trained_state(denoiser, choose_parameters(denoiser, DYNAMICRAFTER, "temporal"))
    theirs = denoiser.state_dict()
    assert all(torch.equal(value, theirs[name]) for name, value in state.items())
    assert all(group_of(name) == "temporal" for name in state)
    assert not any(state[name].data_ptr() == theirs[name].data_ptr() for name in state)


@pytest.mark.parametrize(
    ("trains", "lora", "message"),
    [
        ("adapter", None, r"no parameter .* is of `adapter`(?s:.)*Add an adapter"),
        ("adaptor", None, r"no parameter group `adaptor`(?s:.)*adapter"),
        ("*.attn7.*", None, r"`\*\.attn7\.\*`; its groups are: .*temporal(?s:.)*names like"),
        ("joint", None, r"is of `joint`"),
        ("re:norm1", LoraShape(), r"no linear or convolution layer"),
    ],
)
def test_what_the_denoiser_lacks_is_named(trains, lora, message):
    with pytest.raises(ConfigError, match=message):
        choose_parameters(denoiser_of(tiny_pipeline()), DYNAMICRAFTER, trains, lora=lora)


def test_a_second_lora_beside_the_first_is_refused(pipeline):
    denoiser = denoiser_of(pipeline)
    choose_parameters(denoiser, DYNAMICRAFTER, "temporal", lora=LoraShape())
    with pytest.raises(ConfigError, match="has LoRA layers already"):
        choose_parameters(denoiser, DYNAMICRAFTER, "temporal")
