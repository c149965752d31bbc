"""LoRAs are trained beside quantised weights, of which no bit changes.

Run them with `make test-quantised`, which installs what quantises.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from motionmerge.errors import ConfigError
from motionmerge.parameter_groups import WAN
from motionmerge.switching.expert_bank import experts
from motionmerge.training.denoisers.choice import denoiser_for
from motionmerge.training.denoisers.condition import plain_condition
from motionmerge.training.parameters import LoraShape, choose_parameters, trained_state

from ..switching.test_quantised import FAMILY, QUANTISED, bits, same_bits
from ..tiny.loras import with_weights
from ..tiny.pipelines import tiny
from .test_trainer import SETTINGS, log_of, train

TRAINABLE = ("bitsandbytes int8", "bitsandbytes nf4", "torchao int8 weights")


@pytest.fixture(params=TRAINABLE)
def pipeline(request: pytest.FixtureRequest) -> Any:
    """A tiny Wan whose blocks are quantised."""
    made = tiny(FAMILY)
    QUANTISED[request.param](made.transformer.blocks)
    return made


def predicted(denoiser: Any) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)

    def drawn(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    noisy = drawn(1, 16, 2, 2, 2).requires_grad_(torch.is_grad_enabled())
    condition = plain_condition(
        latents=drawn(1, 20, 2, 2, 2), prompt_embeds=drawn(1, 4, 16), image_embeds=drawn(1, 5, 8)
    )
    return denoiser(noisy, torch.tensor([500.0]), condition)


def test_a_lora_learns_in_fp32_beside_weights_that_stay(pipeline: Any) -> None:
    denoiser = denoiser_for(pipeline).requires_grad_(False)
    before, plain = bits(pipeline.transformer), predicted(denoiser)
    trained = choose_parameters(denoiser, WAN, "joint", lora=LoraShape(rank=2))
    assert {one.dtype for one in trained.parameters} == {torch.float32}
    assert torch.equal(predicted(denoiser), plain)
    optimizer = torch.optim.AdamW(trained.parameters, lr=0.05)
    losses = []
    for _ in range(4):
        loss = predicted(denoiser).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    after = {
        name.replace(".base_layer", ""): one
        for name, one in bits(pipeline.transformer).items()
        if ".lora_" not in name
    }
    assert same_bits(after, before)
    with torch.no_grad():
        tuned, state = predicted(denoiser), trained_state(denoiser, trained)
    fresh = tiny(FAMILY)
    with torch.no_grad(), experts(fresh, **with_weights(state, {"all": 1.0})):
        # The base is not quantised here.
        torch.testing.assert_close(predicted(denoiser_for(fresh)), tuned, atol=0.1, rtol=0.1)


def test_quantised_weights_themselves_are_not_trained(pipeline: Any) -> None:
    with pytest.raises(ConfigError, match=r"quantised or packed(?s:.)*Train a LoRA"):
        choose_parameters(denoiser_for(pipeline), WAN, "joint")


def test_adamw_in_eight_bits_learns_and_resumes_with_the_same_bits(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes", exc_type=ImportError)
    settings = replace(SETTINGS, optimizer="adamw8bit", learning_rate=0.01)

    def build() -> nn.Module:
        torch.manual_seed(0)  # below 4096 numbers moments have 32 bits
        return nn.Sequential(nn.Linear(3, 2048), nn.GELU(), nn.Linear(2048, 1))

    def killed(progress: Any) -> None:
        if progress.step == 25:
            raise KeyboardInterrupt

    whole = train(tmp_path / "whole", settings, build=build)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "killed", settings, build=build, on_progress=killed)
    again = train(tmp_path / "killed", settings, build=build)
    pairs = zip(whole.parameters(), again.parameters(), strict=True)
    assert all(torch.equal(mine, other) for mine, other in pairs)
    assert b"state1" in (tmp_path / "whole/state-00000040.pt").read_bytes()
    losses = [line["loss"] for line in log_of(tmp_path / "whole")]
    assert losses[-1] < 0.5 * losses[0]
