"""Where the adapter earns its place: stage 1 with and without it, where text has no other way in.

    python benchmarks/training_adapter.py runs/adapter-place

Two bases, both the shipped pocket base: in one, spatial attention sees the empty caption whatever
the prompt, so that the model has no text, like SVD; in the other it sees the prompt, but only the
temporal half is trained. Each is fine-tuned with and without the adapter, on the same clips and
noise, by several training seeds. Measured are videos of test prompts, and how much a held-out
caption helps to predict. Intervals are drawn over training seeds and prompts. 45 minutes of one
core; the same command goes on after a kill.
"""

from __future__ import annotations

import argparse
import contextlib
import resource
from collections.abc import Hashable, Mapping
from dataclasses import asdict, replace
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
    attention_kernel,
    build_pocket_model,
    load_decoder,
    load_denoiser,
    load_towers,
    weights_path,
)
from motionmerge.sampling.pipelines.pocket import pipeline_from_model
from motionmerge.training.pocket.video import (
    ClipData,
    Denoiser,
    DrawnClips,
    TrainingBatch,
    Trains,
    VideoObjective,
    trained_parameters,
)
from motionmerge.training.settings import TrainerSettings
from motionmerge.training.trainer import fit

WAYS: dict[str, dict[str, Trains]] = {
    "no text": {"adapter": "adapter and U-Net", "naive": "U-Net"},
    "frozen spatial": {"adapter": "adapter and temporal blocks", "naive": "temporal blocks"},
}
# As fast as the base's: a camera that hardly moves goes neither where it was told nor elsewhere.
DATA = ClipData(slow_power=1.0, missing_captions=0.0, wrong_captions=0.0)
FIRST_TIMESTEP = 600  # noise level 0.72: below it the data have decided where things go
HELD_OUT_SEED, HELD_OUT_BATCHES, HELD_OUT_BATCH = 1000, 16, 8
MEASURES = {
    "obeyed": ("obedience (%)", 100, 1),
    "direction_right": ("halves right (%)", 100, 1),
    "camera_right": ("camera right (%)", 100, 1),
    "degree": ("motion degree (px)", 1, 2),
    "intact": ("intact (%)", 100, 1),
    "caption_helps": ("loss of a wrong caption (%)", 100, 1),
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


class HighNoiseObjective(VideoObjective):
    """The pocket objective at the noise that decides where things go."""

    def __init__(self, model: PocketModel, data: ClipData, *, seed: int) -> None:
        super().__init__(model, data, seed=seed)
        self.last = self.draw.num_timesteps - 1
        self.draw = replace(self.draw, num_timesteps=self.last + 1 - FIRST_TIMESTEP)

    def prepare(self, drawn: DrawnClips) -> TrainingBatch:
        return super().prepare(drawn._replace(timesteps=self.last - drawn.timesteps))


def run_one(base: str, way: str, seed: int, *, given: argparse.Namespace) -> Values:
    """Train, or go on with training, and measure what is not measured yet."""
    model = load_base(base, seed=seed)
    name = f"{base}, {way}, seed {seed}"
    settings = TrainerSettings(
        steps=given.steps,
        batch_size=given.batch_size,
        learning_rate=2e-3,
        warmup_steps=given.steps // 20,
        ema_decay=0.98,
        seed=seed,
        save_every=50,
    )
    own = dict(model.unet.named_parameters())
    result = fit(
        Denoiser(model),
        HighNoiseObjective(model, DATA, seed=seed),
        settings,
        given.output / name.replace(", ", "-").replace(" ", "-"),
        trainable=[own[one] for one in trained_parameters(model, WAYS[base][way])],
        identity={"data": asdict(DATA), "first_timestep": FIRST_TIMESTEP, "base": base},
        kernels=attention_kernel,
    )
    print(f"{name}: loss {result.loss:.4f}", flush=True)
    return measure(model, name, given=given)


@torch.no_grad()
def caption_helps(model: PocketModel) -> dict[Hashable, float]:
    """By held-out batch: how much larger the loss is with the captions of other clips."""
    objective, denoiser = HighNoiseObjective(model, DATA, seed=HELD_OUT_SEED), Denoiser(model)
    helps: dict[Hashable, float] = {}
    for batch in range(HELD_OUT_BATCHES):
        first = batch * HELD_OUT_BATCH
        right = objective.batch(range(first, first + HELD_OUT_BATCH))
        wrong = right._replace(text=right.text.roll(1, 0))
        losses = [float(objective.loss(denoiser, *one)) for one in (right, wrong)]
        helps[batch] = losses[1] / losses[0] - 1
    return helps


def measure(model: PocketModel, name: str, *, given: argparse.Namespace) -> Values:
    protocol = Protocol(num=given.prompts, num_inference_steps=given.denoising_steps)
    clips = KeptRun(pipeline_from_model(model), given.output).clips(
        contextlib.nullcontext,
        name=name,
        key=f"{FORMAT}, {name}, {protocol.num_inference_steps}",
        protocol=protocol,
    )
    return {**observed_of(clips).values, "caption_helps": caption_helps(model)}


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
    parser.add_argument("--steps", type=int, default=160)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--prompts", type=int, default=48)
    parser.add_argument("--denoising-steps", type=int, default=12)
    given = parser.parse_args()
    results: dict[str, dict[str, dict[int, Values]]] = {}
    for base, ways in WAYS.items():
        before = measure(load_base(base, seed=0), f"{base}, before", given=given)
        results[base] = {"none": {0: before}} | {way: {} for way in ways}
        for seed in range(given.seeds):
            for way in ways:
                results[base][way][seed] = run_one(base, way, seed, given=given)
    print_table(results)
    used = resource.getrusage(resource.RUSAGE_SELF)
    print(f"{(used.ru_utime + used.ru_stime) / 60:.1f} minutes of CPU")


if __name__ == "__main__":
    main()
