"""Where the adapter earns its place: stage 1 with and without it, where text has no other way in.

    python benchmarks/training_adapter.py runs/adapter-place

Two bases, both the shipped pocket base: in one, spatial attention sees the empty caption whatever
the prompt, so that the model has no text, like SVD; in the other it sees the prompt, but only the
temporal half is trained. Each is fine-tuned with and without the adapter, on the same clips and
noise, by several training seeds, and measured on test prompts. Intervals are drawn over training
seeds and prompts. About an hour of one core; the same command goes on after a kill.
"""

from __future__ import annotations

import argparse
import contextlib
import resource
from collections.abc import Hashable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from diffusers.models.transformers.transformer_2d import Transformer2DModel

from motionmerge.evaluation.pocket.bench import observed_of
from motionmerge.evaluation.pocket.runs import FORMAT, KeptRun, Protocol
from motionmerge.evaluation.statistics import Estimate, bootstrap_mean
from motionmerge.models.dynamicrafter.cross_attention import CrossContext
from motionmerge.models.pocket.components import (
    PocketModel,
    build_pocket_model,
    load_decoder,
    load_denoiser,
    load_towers,
    weights_path,
)
from motionmerge.sampling.pipelines.pocket import pipeline_from_model
from motionmerge.training.pocket.video import ClipData, Trains, fine_tune
from motionmerge.training.settings import TrainerSettings

WAYS: dict[str, dict[str, Trains]] = {
    "no text": {"adapter": "adapter and U-Net", "naive": "U-Net"},
    "frozen spatial": {"adapter": "adapter and temporal blocks", "naive": "temporal blocks"},
}
# As fast as the base's: a camera that hardly moves goes neither where it was told nor elsewhere.
DATA = ClipData(slow_power=1.0, missing_captions=0.05, wrong_captions=0.0)
MEASURES = {
    "obeyed": ("obedience (%)", 100, 1),
    "direction_right": ("halves right (%)", 100, 1),
    "camera_right": ("camera right (%)", 100, 1),
    "degree": ("motion degree (px)", 1, 2),
    "intact": ("intact (%)", 100, 1),
}
"""Heading, factor and digits of each."""

Values = Mapping[str, Mapping[Hashable, float]]
"""Each measure by prompt."""


def load_base(base: str, *, seed: int) -> PocketModel:
    model = build_pocket_model(seed=seed)
    load_towers(model)
    load_decoder(model)
    load_denoiser(model, weights_path("base"))
    if base == "no text":
        hide_text(model)
    return model


def hide_text(model: PocketModel) -> None:
    """Let spatial attention see the empty caption, which a fifth of the base's clips had.

    The adapter still reads the prompt.
    """
    with torch.no_grad():
        empty = model.text_encoder(model.tokenizer([""])).last_hidden_state

    def hidden(_: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        context: CrossContext = kwargs["encoder_hidden_states"]
        text = empty.to(context.text).expand_as(context.text)
        return args, {**kwargs, "encoder_hidden_states": replace(context, text=text)}

    for module in model.unet.modules():
        if isinstance(module, Transformer2DModel):
            module.register_forward_pre_hook(hidden, with_kwargs=True)


def run_one(base: str, way: str, seed: int, *, given: argparse.Namespace) -> Values:
    """Train, or go on with training, and measure what is not measured yet."""
    model = load_base(base, seed=seed)
    name = f"{base}, {way}, seed {seed}"
    settings = TrainerSettings(
        steps=given.steps,
        batch_size=given.batch_size,
        learning_rate=1e-3,
        warmup_steps=given.steps // 20,
        ema_decay=0.98,
        seed=seed,
        save_every=50,
    )
    result = fine_tune(
        model,
        given.output / name.replace(", ", "-").replace(" ", "-"),
        data=DATA,
        settings=settings,
        trains=WAYS[base][way],
    )
    print(f"{name}: loss {result.loss:.4f}", flush=True)
    return measure(model, name, given=given)


def measure(model: PocketModel, name: str, *, given: argparse.Namespace) -> Values:
    protocol = Protocol(num=given.prompts, num_inference_steps=given.denoising_steps)
    clips = KeptRun(pipeline_from_model(model), given.output).clips(
        contextlib.nullcontext,
        name=name,
        key=f"{FORMAT}, {name}, {protocol.num_inference_steps}",
        protocol=protocol,
    )
    return observed_of(clips).values


def estimate(runs: Mapping[int, Mapping[Hashable, float]]) -> Estimate:
    """Average over training seeds and prompts, with an interval over both."""
    known = [(seed, prompt, one) for seed, run in runs.items() for prompt, one in run.items()]
    seeds, prompts, values = zip(*known, strict=True)
    return bootstrap_mean(values, clusters=prompts, training_seeds=seeds)


def difference(
    first: Mapping[Hashable, float], second: Mapping[Hashable, float]
) -> dict[Hashable, float]:
    return {prompt: first[prompt] - second[prompt] for prompt in first}


def print_table(results: Mapping[str, Mapping[str, Mapping[int, Values]]]) -> None:
    print("| base | fine-tune | " + " | ".join(name for name, *_ in MEASURES.values()) + " |")
    print("|" + "---|" * (2 + len(MEASURES)))
    for base, ways in results.items():
        for way, runs in ways.items():
            print_row(base, way, runs)
        both = {
            seed: {name: difference(with_it[name], ways["naive"][seed][name]) for name in MEASURES}
            for seed, with_it in ways["adapter"].items()
        }
        print_row(base, "adapter minus naive", both, sign=True)


def print_row(base: str, way: str, runs: Mapping[int, Values], *, sign: bool = False) -> None:
    cells = [
        estimate({seed: run[name] for seed, run in runs.items()})
        .scaled(factor)
        .text(digits, sign=sign)
        for name, (_, factor, digits) in MEASURES.items()
    ]
    print(f"| {base} | {way} | " + " | ".join(cells) + " |")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("output", type=Path)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--prompts", type=int, default=72)
    parser.add_argument("--denoising-steps", type=int, default=12)
    given = parser.parse_args()
    results: dict[str, dict[str, dict[int, Values]]] = {}
    for base in WAYS:
        before = measure(load_base(base, seed=0), f"{base}, before", given=given)
        results[base] = {"none": {0: before}} | {way: {} for way in WAYS[base]}
    for seed in range(given.seeds):  # seeds last, so that a run that is cut short has pairs
        for base in WAYS:
            for way in WAYS[base]:
                results[base][way][seed] = run_one(base, way, seed, given=given)
    print_table(results)
    used = resource.getrusage(resource.RUSAGE_SELF)
    print(f"{(used.ru_utime + used.ru_stime) / 60:.1f} minutes of CPU")


if __name__ == "__main__":
    main()
