"""The benchmark of the adapter: what its bases see, and which runs it compares."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

from motionmerge.models.pocket.components import PocketModel
from motionmerge.training.pocket.video import Denoiser, VideoObjective


@pytest.fixture(scope="module")
def benchmark():
    path = Path(__file__).parents[3] / "benchmarks" / "training_adapter.py"
    spec = importlib.util.spec_from_file_location("training_adapter", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@torch.no_grad()
def difference_by_prompt(model: PocketModel) -> float:
    """Return how much the prediction changes with the prompt."""
    prompts = ["the red ball moves left", "the camera zooms in"]
    text = model.text_encoder(model.tokenizer(prompts)).last_hidden_state
    latents = torch.randn(1, 20, 8, 8, 8, generator=torch.Generator().manual_seed(0))
    image = torch.zeros(2, 65, text.shape[-1])
    first, second = Denoiser(model)(
        latents.expand(2, -1, -1, -1, -1), torch.tensor([900, 900]), text, image
    )
    return float((first - second).abs().max())


def test_a_base_without_text_knows_the_prompt_by_its_adapter_alone(benchmark):
    without, with_text = (benchmark.load_base(name, seed=0) for name in benchmark.WAYS)
    assert difference_by_prompt(without) < 1e-5
    assert difference_by_prompt(with_text) > 1e-2
    for transformer in without.unet.temporal_transformers():  # as training would
        transformer.fusion.proj.weight.data.add_(0.05)
    assert difference_by_prompt(without) > 1e-2


def test_the_benchmark_pairs_both_ways_of_a_base(benchmark, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(VideoObjective.__init__.__kwdefaults__, "num_canvases", 8)
    monkeypatch.setattr(benchmark, "HELD_OUT_BATCHES", 1)
    monkeypatch.setattr(benchmark, "HELD_OUT_BATCH", 2)
    monkeypatch.delitem(benchmark.WAYS, "frozen spatial")
    words = "--seeds 1 --steps 1 --batch-size 1 --prompts 1 --denoising-steps 1"
    monkeypatch.setattr(sys, "argv", ["training_adapter.py", str(tmp_path), *words.split()])
    benchmark.main()
    rows = [
        line.split(" | ") for line in capsys.readouterr().out.splitlines() if "| no text" in line
    ]
    assert [row[1] for row in rows] == ["none", "adapter", "naive", "adapter minus naive"]
    degree = {row[1]: float(row[5].split()[0]) for row in rows}
    gain = degree["adapter"] - degree["naive"]
    assert degree["adapter minus naive"] == pytest.approx(gain, abs=0.011)
