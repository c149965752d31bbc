"""Quantised checkpoints on the command line: shown, read, written, or refused with a way out."""

from __future__ import annotations

import json

import pytest
import torch
from typer.testing import CliRunner

from motionmerge.cli import app
from motionmerge.io.weights import save_weights

LAYER = "blocks.0.attn1.to_q"


@pytest.fixture
def folder(tmp_path):
    """A pair in scaled fp8, one in nf4, and a bf16 one."""
    for seed, name in enumerate(("base", "tuned")):
        weight = 0.02 * torch.randn(24, 32, generator=torch.Generator().manual_seed(seed))
        scale = weight.abs().max() / 448
        fp8 = {
            f"{LAYER}.weight": (weight / scale).to(torch.float8_e4m3fn),
            f"{LAYER}.scale_weight": scale,
            "scaled_fp8": torch.zeros(0, dtype=torch.float8_e4m3fn),
        }
        nf4 = {
            f"{LAYER}.weight": torch.zeros(384, 1, dtype=torch.uint8),
            f"{LAYER}.weight.absmax": torch.ones(12),
            f"{LAYER}.weight.quant_state.bitsandbytes__nf4": torch.zeros(80, dtype=torch.uint8),
        }
        save_weights(tmp_path / f"{name}-fp8.safetensors", fp8)
        save_weights(tmp_path / f"{name}-nf4.safetensors", nf4)
        save_weights(tmp_path / f"{name}-bf16.safetensors", {f"{LAYER}.weight": weight.bfloat16()})
    return tmp_path


def run(*words):
    result = CliRunner().invoke(app, [str(word) for word in words])
    assert result.exception is None or isinstance(result.exception, SystemExit)
    return result.exit_code, result.output


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("fp8", "fp8_e4m3fn with `scale_weight`: 1 layers"),
        ("nf4", "bitsandbytes 4-bit (nf4 or fp4), 1 layers; only LoRAs can be used with it"),
    ],
)
def test_show_says_how_a_file_is_quantised(kind, words, folder):
    code, output = run("show", folder / f"base-{kind}.safetensors", "--json")
    assert code == 0
    assert json.loads(output)["quantised"] == [words]


def test_show_counts_weights_and_scales_apart(folder):
    code, output = run("show", folder / "base-fp8.safetensors", "--json", "--groups")
    assert code == 0
    found = json.loads(output)
    assert (found["tensors"], found["with_scales"]) == (1, 3)
    assert (found["parameters"], found["groups"]) == (24 * 32, {"joint": 24 * 32})
    assert found["bytes"] == 24 * 32 + 4 and found["dtypes"] == ["fp8_e4m3fn"]


def test_show_says_nothing_of_the_kind_about_weights(folder):
    code, output = run("show", folder / "base-bf16.safetensors", "--json")
    assert code == 0
    assert "quantised" not in json.loads(output)


@pytest.mark.parametrize("verb", ["extrapolate", "compare"])
def test_4_bit_codes_are_refused_in_every_verb_that_computes(verb, folder):
    pair = [folder / f"{name}-nf4.safetensors" for name in ("base", "tuned")]
    code, output = run(verb, *pair, *(["-o", folder / "out"] if verb == "extrapolate" else []))
    assert code == 2
    assert "nf4" in output
    assert "Fix: Give unquantised weights" in " ".join(output.split())


@pytest.mark.parametrize(("dtype", "written"), [(None, "bf16"), ("fp8_scaled", "fp8_e4m3fn")])
def test_extrapolating_codes_says_what_is_written(dtype, written, folder):
    pair = [folder / f"{name}-fp8.safetensors" for name in ("base", "tuned")]
    chosen = [] if dtype is None else ["--dtype", dtype]
    code, output = run("extrapolate", *pair, "-o", folder / "out", *chosen)
    assert code == 0
    assert ("written in bf16" in output) == (dtype is None)
    _, shown = run("show", folder / "out" / "extrapolated.safetensors", "--json")
    assert written in json.loads(shown)["dtypes"]


def test_comparing_codes_with_their_values_in_bf16_finds_the_rounding_alone(folder):
    code, output = run(
        "compare", folder / "base-fp8.safetensors", folder / "base-bf16.safetensors", "--json"
    )
    assert code == 0
    assert 0.01 < json.loads(output)["total"]["relative"] < 0.05
