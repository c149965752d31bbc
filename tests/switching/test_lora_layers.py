"""Signed LoRAs: fused layers, layers that PEFT cannot adapt, missing ones, compiled models."""

from __future__ import annotations

import copy
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import diffusers
import pytest
import torch
from torch import nn

from motionmerge.errors import CheckpointError, ConfigError
from motionmerge.merging.algebra.nodes import Checkpoint
from motionmerge.merging.lora.task_vector import lora
from motionmerge.schedule import ExpertSchedule, ScheduleEntry
from motionmerge.switching.expert_bank import attached_bank, experts
from motionmerge.switching.lora_layers import read_lora

from ..tiny.loras import with_weights

Tensors = dict[str, torch.Tensor]
SCHEDULE = ExpertSchedule((ScheduleEntry("away", timestep=500), ScheduleEntry("whole")))
WEIGHTS = {"away": -0.5, "whole": 1.0}


class Branch(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.to_q, self.to_k, self.to_v = (nn.Linear(6, 6) for _ in range(3))
        self.norm_q = nn.RMSNorm(6)

    def forward(self, sample: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.norm_q(self.to_q(sample) + self.to_k(sample)) + self.to_v(sample))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(Branch() for _ in range(2))
        self.to_qkv = nn.Linear(6, 18)
        self.table = nn.Parameter(torch.zeros(6))

    def forward(self, sample: torch.Tensor, timestep: Any) -> torch.Tensor:
        for block in self.blocks:
            sample = block(sample)
        return self.to_qkv(sample + self.table)


def pair(path: str, rows: int = 6, *, seed: int = 0, alpha: float | None = None) -> Tensors:
    generator = torch.Generator().manual_seed(seed)
    file = {
        f"{path}.lora_down.weight": torch.randn(2, 6, generator=generator),
        f"{path}.lora_up.weight": torch.randn(rows, 2, generator=generator),
    }
    return file if alpha is None else file | {f"{path}.alpha": torch.tensor(alpha)}


def product(file: Tensors, path: str) -> torch.Tensor:
    factor = float(file.get(f"{path}.alpha", torch.tensor(2.0))) / 2
    return factor * file[f"{path}.lora_up.weight"] @ file[f"{path}.lora_down.weight"]


def outputs(model: nn.Module, file: Tensors, **options: Any) -> torch.Tensor:
    """Run a model at a noisy and at a clean timestep, with a signed LoRA, and without again."""
    sample = torch.linspace(-1, 1, 6)[None]

    def both() -> list[torch.Tensor]:
        return [model(sample, timestep=torch.tensor(step)).detach() for step in (900, 100)]

    plain = both()
    with experts(model, **with_weights(file, WEIGHTS), schedule=SCHEDULE, **options):
        found = [*both(), *both()]
    after = both()
    assert all(torch.equal(one, other) for one, other in zip(plain, after, strict=True))
    return torch.cat([*plain, *found])


def test_a_fused_projection_is_dealt_over_the_layers() -> None:
    path = "diffusion_model.blocks.0.qkv"
    file = pair(path, 18, alpha=3.0) | {f"{path}.diff_b": torch.arange(18.0)}
    layers = read_lora(file, {"transformer": Model()}, name="style").layers["transformer"]
    parts = [layers[f"blocks.0.to_{part}"] for part in "qkv"]
    found = torch.cat([part.alpha / part.rank * part.up @ part.down for part in parts])
    torch.testing.assert_close(found, product(file, path))
    biases = [part.alpha / part.rank * part.bias for part in parts if part.bias is not None]
    torch.testing.assert_close(torch.cat(biases), torch.arange(18.0))


@pytest.mark.parametrize("present", ["qkv", "qv", "k"])
def test_single_projections_are_stacked_in_a_fused_layer(present: str) -> None:
    file: Tensors = {}
    for seed, part in enumerate(present):
        file |= pair(f"transformer.to_{part}", seed=seed, alpha=seed + 1.0)
    net = nn.Module()
    net.add_module("to_qkv", nn.Linear(6, 18))
    (layer,) = read_lora(file, {"transformer": net}, name="style").layers["transformer"].values()
    zero = torch.zeros(6, 6)
    expected = [product(file, f"transformer.to_{p}") if p in present else zero for p in "qkv"]
    torch.testing.assert_close(
        layer.alpha / layer.rank * layer.up @ layer.down, torch.cat(expected)
    )


def test_an_alpha_of_zero_leaves_the_plain_difference_of_a_bias() -> None:
    file = pair("blocks.0.to_q", alpha=0.0) | {"blocks.0.to_q.diff_b": torch.arange(6.0)}
    layer = read_lora(file, {"denoiser": Model()}, name="style").layers["denoiser"]["blocks.0.to_q"]
    assert not (layer.alpha / layer.rank * layer.up @ layer.down).any()
    assert layer.bias is not None
    assert torch.equal(layer.alpha / layer.rank * layer.bias, torch.arange(6.0))


def test_original_hunyuan_video_loras_with_fused_names_are_attached_and_taken_off() -> None:
    torch.manual_seed(0)
    model = diffusers.HunyuanVideoTransformer3DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=10, num_layers=1,
        num_single_layers=1, num_refiner_layers=1, patch_size=1, text_embed_dim=16,
        pooled_projection_dim=8, rope_axes_dim=(2, 4, 4),
    )  # fmt: skip
    path = "diffusion_model.double_blocks.0.img_attn_qkv"
    up, down = torch.randn(60, 2), torch.randn(2, 20)
    file = {f"{path}.lora_A.weight": down, f"{path}.lora_B.weight": up}
    before = dict(model.named_modules())
    with experts(model, **with_weights(file, WEIGHTS), schedule=SCHEDULE):
        for part, rows in zip("qkv", up.chunk(3), strict=True):
            layer = getattr(model.transformer_blocks[0].attn, f"to_{part}")
            (one,), (other,) = layer.lora_B.values(), layer.lora_A.values()
            torch.testing.assert_close(one.weight @ other.weight, rows @ down)
    assert dict(model.named_modules()) == before


NOT_SIGNED = {
    "a norm": {"blocks.0.norm_q.lora_A.weight": (2, 6), "blocks.0.norm_q.lora_B.weight": (6, 2)},
    "a bare parameter": {"table.diff": (6,)},
    "a norm's difference": {"blocks.0.norm_q.diff": (6,)},
    "a bias alone": {"blocks.0.to_q.diff_b": (6,)},
    "a whole difference": {"blocks.0.to_q.diff": (6, 6)},
    "a LoHa": {f"blocks.0.to_q.hada_w{i}_{x}": (6, 6) for i in (1, 2) for x in "ab"},
}


@pytest.mark.parametrize("shapes", NOT_SIGNED.values(), ids=list(NOT_SIGNED))
def test_what_needs_dense_weights_is_said_to_with_the_way_to_them(
    shapes: dict[str, tuple[int, ...]],
) -> None:
    model = Model()
    before = dict(model.named_modules())
    file = pair("blocks.1.to_q") | {key: torch.ones(shape) for key, shape in shapes.items()}
    with pytest.raises(CheckpointError, match=r"(?s)blocks\.0|table.*Fix: Use it in dense experts"):
        experts(model, **with_weights(file, WEIGHTS), schedule=SCHEDULE)
    assert dict(model.named_modules()) == before
    assert attached_bank(model) is None


def test_layers_that_the_model_lacks_are_refused_or_left_out_with_a_warning() -> None:
    file = pair("blocks.0.to_q")
    more = file | pair("blocks.7.to_q") | {"blocks.7.to_q.diff_b": torch.ones(6)}
    with pytest.raises(CheckpointError, match=r"`blocks\.7\.to_q`.*(?s:.*)missing='keep'"):
        outputs(Model(), more)
    with pytest.warns(UserWarning, match=r"`style` is used without blocks\.7\.to_q"):
        kept = outputs(Model(), more, missing="keep")
    assert torch.equal(kept, outputs(Model(), file))
    model = Model()
    with (
        pytest.warns(UserWarning),
        experts(model, **with_weights(more, WEIGHTS), schedule=SCHEDULE, missing="keep") as bank,
    ):
        left_out: Any = getattr(bank, "left_out", None)
        assert list(left_out["style"]) == ["blocks.7.to_q", "blocks.7.to_q.diff_b"]
    with pytest.raises(CheckpointError):
        outputs(Model(), pair("blocks.7.to_q"), missing="keep")
    with pytest.raises(ConfigError, match="`missing`"):
        outputs(Model(), file, missing="drop")


class Patches(nn.Module):
    def __init__(self, embedding: nn.Module) -> None:
        super().__init__()
        self.patch_embedding = embedding

    def forward(self, sample: torch.Tensor, timestep: Any) -> torch.Tensor:
        return self.patch_embedding(sample)


@pytest.mark.parametrize("flat", ["the file", "the model"])
def test_a_patch_embedding_is_the_same_with_its_kernel_flattened(flat: str) -> None:
    torch.manual_seed(0)
    down, up = torch.randn(2, 3, 1, 2, 2), torch.randn(5, 2, 1, 1, 1)
    sample = torch.randn(1, 3, 4, 6, 6)
    layer: nn.Module = nn.Conv3d(3, 5, (1, 2, 2), stride=(1, 2, 2), bias=False)
    if flat == "the file":
        down, up = down.flatten(1), up.flatten(1)
    else:
        layer, sample = nn.Linear(12, 5, bias=False), torch.randn(4, 12)
    weight = layer.weight.detach()
    file = {"patch_embedding.lora_A.weight": down, "patch_embedding.lora_B.weight": up}
    base = Checkpoint.from_tensors({"patch_embedding.weight": weight}, name="base")
    model, merged = Patches(layer), copy.deepcopy(Patches(layer))
    merged.load_state_dict((base + lora(file, 1.0)).tensors())
    with experts(model, **with_weights(file, {"one": 1.0})):
        found = model(sample, timestep=0)
    torch.testing.assert_close(found, merged(sample, timestep=0), atol=1e-5, rtol=1e-5)


def test_one_denoiser_of_a_file_for_two_can_be_used_alone() -> None:
    file = pair("transformer.blocks.0.to_q", seed=1) | pair("transformer_2.blocks.0.to_q", seed=2)
    pipeline = SimpleNamespace(transformer=Model(), transformer_2=Model())
    for number, name in enumerate(("transformer", "transformer_2"), start=1):
        chosen = with_weights(file, WEIGHTS)
        with experts(pipeline, **chosen, schedule=SCHEDULE, module=name):
            layer = getattr(pipeline, name).blocks[0].to_q
            (up,) = layer.lora_B.values()
            assert torch.equal(up.weight, pair("x", seed=number)["x.lora_up.weight"])
    second = pair("transformer_2.blocks.0.to_v")
    with pytest.raises(CheckpointError, match=r"to_v.weight` \(not of `transformer`\)"):
        experts(pipeline, **with_weights(second, {"one": 1.0}), module="transformer")


def compiled(model: nn.Module) -> nn.Module:
    return torch.compile(model, backend="eager")  # type: ignore[return-value]


def with_compiled_blocks(model: nn.Module) -> nn.Module:
    for number, block in enumerate(model.blocks):  # type: ignore[arg-type, union-attr]
        model.blocks[number] = compiled(block)  # type: ignore[index, operator]
    return model


def in_place(model: nn.Module) -> nn.Module:
    model.compile(backend="eager")
    return model


@pytest.mark.parametrize("compile_it", [compiled, with_compiled_blocks, in_place])
def test_a_compiled_model_gets_its_lora_at_every_step(
    compile_it: Callable[[nn.Module], nn.Module],
) -> None:
    torch._dynamo.reset()
    file = pair("transformer.blocks.0.to_q") | pair("blocks.1.to_v", seed=1)
    expected = outputs(Model(), file)
    found = outputs(compile_it(Model()), file)
    torch.testing.assert_close(found, expected)
    assert all((expected[0] - other).abs().max() > 0.01 for other in expected[2:])


def test_a_layer_that_is_compiled_by_itself_is_refused() -> None:
    model = Model()
    model.blocks[0].to_q = compiled(model.blocks[0].to_q)  # type: ignore[assignment]
    with pytest.raises(ConfigError, match=r"`blocks\.0\.to_q` is compiled by itself"):
        outputs(model, pair("blocks.0.to_q"))
