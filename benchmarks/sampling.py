"""Seconds and memory of a two-expert DynamiCrafter video, against the official procedure.

    python benchmarks/sampling.py --rounds 3
    python benchmarks/sampling.py --size full --device cuda --steps 16 --rounds 1 --output rows.json

Every row has the same random weights, noise, image and prompt. The first is the official procedure
restated: two whole pipelines in memory, both of which encode the prompt and sixteen times the
image, two forward passes for guidance, attention by explicit products, tokens repeated for every
frame and their keys computed in every step. Each following row keeps what the row before it saves,
up to `motionmerge`, which the last rows vary. Timed is a video from its image and prompt to its
latents, with the weights in place.
Ratio: its seconds over the first row's, within the same round; bf16 rows also have their ratio to
the official procedure in bf16. fp32 rows report the greatest error of the latents, relative to
their greatest entry; bf16 rows the PSNR of the video. Rows of ours also have the seconds of the two
switches of a video, and what share of a video of 50 steps that is.

On a CPU a row is a process of its own, whose peak memory is all that it ever took. Without bf16
products the bf16 rows are left out: they would measure their emulation. On a GPU the rows share a
process, since its start takes longer than a video; the peak is that of the device while the video
is made, weights included. A short video before it takes what only the first one takes: choosing
kernels, compiling. fp32 is fp32 there: TF32 is off.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from diffusers.utils import logging as diffusers_logging
from sampling_official import Restated
from sampling_setup import (
    BOUNDARY,
    COMPILING_STEPS,
    FRAMES,
    GUIDANCE,
    ON_GPU,
    PIPELINE,
    PROMPT,
    SIZES,
    VIDEO_STEPS,
    WARM_UP_STEPS,
    Inputs,
    Row,
    Size,
    build,
    rows,
    write_experts,
)

from motionmerge import Checkpoint, Recipe, experts
from motionmerge.merging.report import peak_memory
from motionmerge.sampling.pipelines.dynamicrafter import DynamiCrafterPipeline
from motionmerge.sampling.pipelines.encoded import Conditions
from motionmerge.sampling.request.folder import find_pipeline
from motionmerge.sampling.request.model import FolderModel


class Clock:
    """Adds up the seconds of what is done inside it, once the device is done with it too."""

    def __init__(self) -> None:
        self.seconds = self.cpu_seconds = 0.0
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

    def __enter__(self) -> None:
        seconds_since(0)
        self.started = time.perf_counter(), time.process_time()

    def __exit__(self, *_: object) -> None:
        self.seconds += seconds_since(self.started[0])
        self.cpu_seconds += time.process_time() - self.started[1]

    def found(self) -> dict[str, float]:
        """What a row reports; on a GPU with the peak of its memory since the clock was made."""
        found = {"seconds": self.seconds, "cpu_seconds": self.cpu_seconds}
        if torch.cuda.is_initialized():
            found["peak_mb"] = torch.cuda.max_memory_allocated() / 1e6
        return found


class Ours:
    """The pipeline as a user calls it, with two experts."""

    def __init__(
        self, pipeline: DynamiCrafterPipeline, inputs: Inputs, row: Row, folder: Path
    ) -> None:
        self.pipeline, self.inputs, self.row, self.folder = pipeline, inputs, row, folder
        if row.channels_last:
            for module in pipeline.unet.modules():
                if isinstance(module, torch.nn.Conv2d):
                    module.to(memory_format=torch.channels_last)
        pipeline.batches_guidance = row.batches_guidance
        if row.captures:
            pipeline.capture_steps()
        if row.compiles:
            # Blocks share their code, which is compiled for each of their sizes, with and without
            # keys.
            torch._dynamo.config.recompile_limit = 64
            pipeline.unet.compile_repeated_blocks()

    def experts(self) -> Any:
        """Attach the two experts, as `motionmerge generate` does: nobody needs the model after."""
        early, late = (str(self.folder / f"{name}.safetensors") for name in ("early", "late"))
        common = {"placement": self.row.placement, "boundary": BOUNDARY, "restore": False}
        if self.row.placement != "recompute":
            both = {"early": Checkpoint.load(early), "late": Checkpoint.load(late)}
            return experts(self.pipeline, both, **common)
        inputs = {"one": early, "two": late}
        formulas = {"early": "one", "late": "one + 1.0 * (two - one)"}
        text = {"inputs": inputs, "experts": formulas}
        return experts(self.pipeline, recipe=Recipe.parse(json.dumps(text)), **common)

    def denoise(self, conditions: Conditions, num_steps: int) -> torch.Tensor:
        """Make latents."""
        options = {} if self.row.keeps_keys else {"callback_on_step_end": lambda *_: {}}
        return self.pipeline(
            conditions=conditions,
            latents=self.inputs.noise,
            eta=0.0,
            output_type="latent",
            num_inference_steps=num_steps,
            **GUIDANCE,
            **options,
        ).frames

    def timed(
        self, num_steps: int, *, warm_up: bool, encoded: Conditions | None, clock: Clock
    ) -> tuple[torch.Tensor, dict[str, float]]:
        """Make a video; returns latents and what was measured, switches included.

        Experts take their memory after the encoders gave back theirs, as `motionmerge generate`
        does it, or before a warm-up.

        Args:
            num_steps: Denoising steps.
            warm_up: Make a short video before.
            encoded: What was encoded while the pipeline was loaded, if it was.
            clock: Adds up the seconds; it has those of `encoded`.
        """
        with ExitStack() as attached:
            bank = None
            if warm_up:
                bank = attached.enter_context(self.experts())
                steps = COMPILING_STEPS if self.row.compiles else WARM_UP_STEPS
                self.denoise(encode(self.pipeline, self.inputs), steps)
                clock = Clock()
            conditions = encoded
            if conditions is None:
                with clock:
                    conditions = encode(self.pipeline, self.inputs)
                    if self.row.frees_towers:
                        self.pipeline.free_encoders()
            bank = bank or attached.enter_context(self.experts())
            with clock:
                latents = self.denoise(conditions, num_steps)
            return latents, {**clock.found(), "switch_seconds": switch_seconds(bank)}


def encode(pipeline: DynamiCrafterPipeline, inputs: Inputs) -> Conditions:
    """Run the encoders."""
    return pipeline.encode(inputs.image, PROMPT, num_frames=FRAMES)


def load_and_encode(
    row: Row, size: Size, folder: Path
) -> tuple[DynamiCrafterPipeline, Inputs, Conditions, Clock]:
    """Load the pipeline on the CPU as `motionmerge generate` does: first what encodes."""
    found: list[Any] = []
    clock = Clock()

    def encode_and_free(pipeline: DynamiCrafterPipeline) -> None:
        inputs = Inputs.draw(size, pipeline, "cpu")
        with clock:
            found.extend((inputs, encode(pipeline, inputs)))
            pipeline.free_encoders()

    model = FolderModel(
        folder=find_pipeline(folder / PIPELINE), dtype=row.dtype, device=torch.device("cpu")
    )
    pipeline, _ = model.load(encode_and_free)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline, *found, clock


def timed_official(
    make: Restated, num_steps: int, *, warm_up: bool
) -> tuple[torch.Tensor, dict[str, float]]:
    """Make a video; returns latents and what was measured."""
    if warm_up:
        make(WARM_UP_STEPS)
    clock = Clock()
    with clock:
        latents = make(num_steps)
    return latents, clock.found()


def switch_seconds(bank: Any) -> float:
    """The seconds of a switch to the first expert and of one back to the last, which is in place.

    What is sent ahead meanwhile on another stream is not waited for, but is there before the next.
    """
    seconds_since(0)
    started = time.perf_counter()
    with bank.with_expert("early"):
        seconds = computed_since(started)
        seconds_since(0)
        started = time.perf_counter()
    return seconds + computed_since(started)


def computed_since(started: float) -> float:
    """The seconds until all that was asked of the device's main stream is done."""
    if torch.cuda.is_initialized():
        torch.cuda.current_stream().synchronize()
    return time.perf_counter() - started


def seconds_since(started: float) -> float:
    """The seconds until all that was asked of the device is done."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.perf_counter() - started


@torch.no_grad()
def run_row(row: Row, size: Size, folder: Path, device: str) -> dict[str, float]:
    """Make one video; saves its latents and frames into the folder."""
    on_gpu = device == "cuda"
    occupied = torch.cuda.memory_allocated() if on_gpu else 0
    encoded, warm_up = None, on_gpu or row.compiles
    if row.frees_towers and row.is_ours and not warm_up:
        pipeline, inputs, encoded, clock = load_and_encode(row, size, folder)
    else:
        pipeline = build(size, device)
        pipeline.to(row.dtype)
        inputs, clock = Inputs.draw(size, pipeline, device), Clock()
    with torch.autocast(device, torch.float16, enabled=row.autocast):
        if row.is_ours:
            ours = Ours(pipeline, inputs, row, folder)
            latents, result = ours.timed(size.steps, warm_up=warm_up, encoded=encoded, clock=clock)
        else:
            restated = Restated(pipeline, inputs, row, folder)
            latents, result = timed_official(restated, size.steps, warm_up=on_gpu)
    if on_gpu:
        result["peak_mb"] -= occupied / 1e6
    else:
        result["peak_mb"] = peak_memory() / 1e6
    video = pipeline.decode_latents(latents, inputs.image)
    torch.save({"latents": latents.cpu(), "video": video.cpu()}, folder / f"{row.name}.pt")
    return result


def compare(row: Row, reference: Row, folder: Path) -> dict[str, float]:
    """Error of a row's output with respect to the first row's."""
    mine, theirs = (torch.load(folder / f"{one.name}.pt") for one in (row, reference))
    if row.dtype == torch.float32 and not row.autocast:
        error = (mine["latents"] - theirs["latents"]).abs().max() / theirs["latents"].abs().max()
        return {"max_error": float(error)}
    return {"psnr_db": float(-10 * (mine["video"] - theirs["video"]).square().mean().log10())}


def bf16_slowdown(device: str) -> float:
    """How many times longer a matrix product takes in bf16 than in fp32."""
    seconds = []
    for dtype in (torch.float32, torch.bfloat16):
        one = torch.ones(512, 512, dtype=dtype, device=device)
        times = []
        for _ in range(4):
            started = time.perf_counter()
            one @ one
            times.append(seconds_since(started))
        seconds.append(min(times))
    return seconds[1] / seconds[0]


def measure(row: Row, options: argparse.Namespace, size: Size, folder: Path) -> dict[str, float]:
    """Run a row: on a CPU in a process of its own, on a GPU in this one.

    Raises:
        RuntimeError: It failed.
    """
    if options.device == "cuda":
        torch.compiler.reset()  # nothing of the row before may count in this one's memory
        gc.collect()
        torch.cuda.empty_cache()
        return run_row(row, size, folder, options.device)
    command = [sys.executable, __file__, "--row", row.name, "--folder", str(folder)]
    command += ["--size", options.size, "--steps", str(size.steps)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    return json.loads(done.stdout.splitlines()[-1])


Found = dict[str, list[dict[str, float]]]


def table(chosen: list[Row], found: Found, size: Size, folder: Path) -> list[dict[str, Any]]:
    """One line for each row that was measured, medians over the rounds."""
    first = chosen[0]
    official = next((row for row in chosen if row.name == "official procedure, bf16"), None)
    lines = []
    for row in chosen:
        runs = found[row.name]
        if not runs or not found[first.name]:
            continue
        line: dict[str, Any] = {
            "name": row.name,
            "seconds": median(runs, "seconds"),
            "cpu_seconds": median(runs, "cpu_seconds"),
            "ratio": ratio(runs, found[first.name]),
            "peak_mb": max(one["peak_mb"] for one in runs),
            "steps": size.steps,
        }
        if official is not None and row.dtype == official.dtype and found[official.name]:
            line["ratio_to_bf16_official"] = ratio(runs, found[official.name])
        if row.is_ours:
            line["switch_seconds"] = median(runs, "switch_seconds")
            whole = line["seconds"] * VIDEO_STEPS / size.steps
            line["switch_share_of_50_steps"] = line["switch_seconds"] / whole
        lines.append({**line, **compare(row, first, folder)})
    return lines


def median(runs: list[dict[str, float]], name: str) -> float:
    return statistics.median(run[name] for run in runs)


def ratio(runs: list[dict[str, float]], others: list[dict[str, float]]) -> float:
    pairs = zip(runs, others, strict=False)
    return statistics.median(one["seconds"] / other["seconds"] for one, other in pairs)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", choices=SIZES, default="mid")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--steps", type=int, help="denoising steps [default: the size's own]")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", help="rows whose name contains this, besides the first")
    parser.add_argument("--json", action="store_true", help="print the rows as JSON")
    parser.add_argument("--output", type=Path, help="write them as JSON here, after each row")
    parser.add_argument("--row", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    size = SIZES[options.size]
    if options.steps:
        size = replace(size, steps=options.steps)
    torch.backends.cudnn.allow_tf32 = False
    diffusers_logging.set_verbosity_error()
    if options.row:
        row = next(one for one in rows() if one.name == options.row)
        print(json.dumps(run_row(row, size, options.folder, options.device)))
        return
    chosen = chosen_rows(options)
    found: Found = {row.name: [] for row in chosen}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_experts(size, folder, options.device)
        for _ in range(options.rounds):
            for row in chosen:
                try:
                    found[row.name].append(measure(row, options, size, folder))
                except Exception as error:  # noqa: BLE001  (the other rows are worth having)
                    print(f"{row.name}: failed\n{error}", file=sys.stderr, flush=True)
                    continue
                lines = table(chosen, found, size, folder)
                made = [line for line in lines if line["name"] == row.name]
                print(*made, file=sys.stderr, flush=True)
                if options.output:
                    options.output.write_text(json.dumps(lines, indent=1), encoding="utf-8")
        lines = table(chosen, found, size, folder)
    if options.json:
        print(json.dumps(lines))
    else:
        print_table(lines)


def chosen_rows(options: argparse.Namespace) -> list[Row]:
    """The rows that were asked for and that this device can compute."""
    by_name = {row.name: row for row in rows()}
    names = list(ON_GPU) if options.device == "cuda" else list(by_name)
    if options.only:
        names = [name for name in by_name if options.only in name]
    chosen = [by_name[name] for name in names]
    if options.device == "cpu":  # which has no fast products in fp16
        chosen = [one for one in chosen if not one.autocast]
    slowdown = bf16_slowdown(options.device)
    if slowdown > 2:
        print(
            f"bf16 rows left out: a matrix product takes {slowdown:.0f} times as long as in fp32 "
            "here, so this processor does not compute in bf16",
            file=sys.stderr,
        )
        chosen = [one for one in chosen if one.dtype != torch.bfloat16]
    return list(dict.fromkeys([rows()[0], *chosen]))


def print_table(lines: list[dict[str, Any]]) -> None:
    """Print the rows for people."""
    print(f"{'':36}{'seconds':>9}{'ratio':>7}{'in bf16':>9}{'peak MB':>9}   error")
    for line in lines:
        error = f"{line['max_error']:.1e}" if "max_error" in line else f"{line['psnr_db']:.0f} dB"
        own = line.get("ratio_to_bf16_official")
        like = "" if own is None else f"{own:.2f}"
        share = line.get("switch_share_of_50_steps")
        switching = "" if share is None else f"{100 * share:.2f} % switching"
        print(
            f"{line['name']:36}{line['seconds']:9.2f}{line['ratio']:7.2f}{like:>9}"
            f"{line['peak_mb']:9.0f}   {error:9}{switching}"
        )


if __name__ == "__main__":
    main()
