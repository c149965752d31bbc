"""The demo: bundled photos through every stage of the method, side by side on one page."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from motionmerge.errors import ConfigError
from motionmerge.evaluation.pocket.charts import knob_figure
from motionmerge.evaluation.pocket.conditions import (
    Condition,
    best_condition,
    knob,
    pick_conditions,
)
from motionmerge.evaluation.pocket.motion import measure_clip
from motionmerge.evaluation.pocket.report import (
    PAGE_FILE,
    Method,
    PageClip,
    PageRow,
    PocketPage,
    Shot,
    write_pocket_page,
)
from motionmerge.evaluation.pocket.runs import (
    RESULTS_FILE,
    ConditionResults,
    Protocol,
    evaluate,
    generate,
)
from motionmerge.evaluation.pocket.tables import share_of, table_row
from motionmerge.evaluation.pocket.typical import typical_shots, write_animation, write_sheet
from motionmerge.evaluation.pocket.verdicts import (
    damage,
    disobedience,
    result_sentence,
    what_to_look_for,
)
from motionmerge.evaluation.report.embedding import embed_video, jpeg_uri
from motionmerge.io.atomic import check_file, prepare_folder
from motionmerge.io.video import fit_image, write_video
from motionmerge.models.pocket.drawing import draw_things
from motionmerge.models.pocket.language import Actor, Program
from motionmerge.models.pocket.world import (
    FRAME_RATE,
    SIZE,
    Scene,
    load_photo,
)
from motionmerge.switching.expert_bank import experts

SHEET_FILE, ANIMATION_FILE = "sheet.jpg", "typical.webp"
SIDE = 256  # pixels, of the videos
NUM_TABLE_PROMPTS = 24
KNOB_EXTRAS = (-0.5, 1.0)

Progress = Callable[[str], None]


@dataclass(frozen=True)
class DemoPrompt:
    """A bundled photo, what lies on it and what should happen."""

    photo: str
    program: Program
    starts: tuple[tuple[float, float], ...] = ()


def _one(color: str, shape: str, *moves: str) -> tuple[Actor, ...]:
    return (Actor(color, shape, moves),)


PROMPTS = (
    DemoPrompt(
        "coffee",
        Program(_one("blue", "ball", "up", "right"), "pans left", camera_is_captioned=True),
        ((28.0, 38.0),),
    ),
    DemoPrompt(
        "rocket",
        Program(_one("yellow", "box", "down"), "zooms in", camera_is_captioned=True),
        ((24.0, 26.0),),
    ),
    DemoPrompt(
        "chelsea",
        Program((Actor("green", "ball", ("left",)), Actor("blue", "box", ("up",))), "pans right"),
        ((38.0, 20.0), (42.0, 46.0)),
    ),
    DemoPrompt(
        "astronaut",
        Program(_one("green", "box", "right", "down"), "tilts up", camera_is_captioned=True),
        ((24.0, 30.0),),
    ),
    DemoPrompt("hubble_deep_field", Program((), "zooms out", camera_is_captioned=True)),
    DemoPrompt("camera", Program(_one("red", "ball", "left", "up"), "pans left"), ((40.0, 38.0),)),
    DemoPrompt("grass", Program(_one("purple", "ball", "right"), "tilts down"), ((26.0, 30.0),)),
    DemoPrompt(
        "brick", Program(_one("blue", "box", "down", "left"), "pans right"), ((38.0, 26.0),)
    ),
    DemoPrompt("gravel", Program((), "pans right", camera_is_captioned=True)),
)


def demo_stages() -> list[tuple[Method, Condition]]:
    """Return the stages of the method, in the order they are shown."""
    base, naive, tuned = pick_conditions(["base", "naive", "tuned"])
    full = best_condition()
    return [
        _stage("Base", "the pretrained model", base),
        _stage("Naive", "fine-tuned without the adapter", naive),
        _stage("Tuned", "stage 1: fine-tuned with text in time", tuned),
        _stage("Extrapolated", "stage 2: away from tuned, α = 0.5", knob(0.5)),
        _stage("Full method", "stage 3: two experts by noise level", full),
        _stage("Reversed", "the two experts swapped", full.reversed()),
    ]


def _stage(title: str, note: str, condition: Condition) -> tuple[Method, Condition]:
    return Method.of(condition, title=title, note=note), condition


def run_demo(
    pipeline: Any,
    *,
    folder: Path,
    num_prompts: int = 6,
    num_table_prompts: int = NUM_TABLE_PROMPTS,
    seed: int = 0,
    num_inference_steps: int = 12,
    inputs: dict[str, Path] | None = None,
    progress: Progress | None = None,
) -> Path:
    """Make the videos and the page.

    Args:
        pipeline: A `PocketPipeline`.
        folder: Where videos and `index.html` go. Of the most typical prompts a contact sheet goes
            there too, `sheet.jpg`, and of the first of them an animation, `typical.webp`; see
            `typical_shots`.
        num_prompts: How many of `PROMPTS`.
        num_table_prompts: Held-out prompts per condition for the table and the knob curve.
        seed: Of the noise.
        num_inference_steps: Denoising steps.
        inputs: Weights files instead of the shipped ones, by name.
        progress: Told what is being done.

    Returns:
        The path of the page.

    Raises:
        ConfigError: There are not so many prompts, or the folder cannot be written to.
    """
    if not 1 <= num_prompts <= len(PROMPTS):
        raise ConfigError(
            f"`num_prompts` is {num_prompts}.", fix=f"Choose 1 to {len(PROMPTS)} prompts."
        )
    _check_outputs(folder)
    tell = progress or (lambda _: None)
    chosen, stages = PROMPTS[:num_prompts], demo_stages()
    images = torch.stack([demo_image(prompt) for prompt in chosen])
    videos = {}
    for shown, condition in stages:
        tell(f"videos: {shown.title}")
        recipe = condition.recipe()
        own = {name: path for name, path in (inputs or {}).items() if name in recipe.inputs}
        with experts(pipeline, recipe=recipe, inputs=own):
            videos[shown.condition] = generate(
                pipeline,
                images,
                [prompt.program.caption() for prompt in chosen],
                names=[f"demo/{seed}/{prompt.photo}" for prompt in chosen],
                num_inference_steps=num_inference_steps,
            )
    tell("mp4s")
    shots = []
    for index, prompt in enumerate(chosen):
        made = {shown: videos[shown.condition][index] for shown, _ in stages}
        shots.append(_shot(folder, prompt, images[index], made, seed=seed))
    measured = evaluate(
        pipeline,
        [*(condition for _, condition in stages), *map(knob, KNOB_EXTRAS)],
        protocol=Protocol(
            num=num_table_prompts, seed=seed, num_inference_steps=num_inference_steps
        ),
        folder=folder,
        inputs=inputs,
        progress=lambda name, _: tell(f"numbers: {name}"),
    )
    of = {shown.title: measured[shown.condition] for shown, _ in stages}
    typical = typical_shots(shots, of)
    shown_videos = [
        {shown.title: videos[shown.condition][index] for shown, _ in stages} for index in typical
    ]
    write_sheet(folder / SHEET_FILE, [shots[index] for index in typical], shown_videos)
    write_animation(folder / ANIMATION_FILE, shots[typical[0]], shown_videos[0])
    page = PocketPage(
        title="The same photo and noise, six sets of weights",
        methods=tuple(shown for shown, _ in stages),
        shots=tuple(shots),
        result=result_sentence(of["Full method"], of["Tuned"]),
        rows=tuple(_row(title, results) for title, results in of.items()),
        about=f"{num_table_prompts} held-out prompts for each set of weights, with 95 % intervals, "
        "by the rules of the badges: a quick look. `motionmerge evaluate pocket` measures on more.",
        figures=(knob_figure(measured),),
        seed=seed,
    )
    return write_pocket_page(page, folder / PAGE_FILE)


def _check_outputs(folder: Path) -> None:
    """Make the folders, and refuse before any video is made what cannot be written."""
    for inner in ("", "videos"):
        prepare_folder(folder / inner)
    for name in (PAGE_FILE, SHEET_FILE, ANIMATION_FILE, RESULTS_FILE):
        check_file(folder / name)


def _row(title: str, results: ConditionResults) -> PageRow:
    row = table_row(results)
    camera = "–" if row.camera_right is None else f"{row.camera_right.value:.0f}"
    return PageRow(
        title,
        {
            "motion degree (px)": row.degree.text(1),
            "obeys (%)": share_of([clip.did_all for clip in results.clips]).text(0),
            "whole (%)": share_of([clip.whole for clip in results.clips]).text(0),
            "objects right (%)": f"{row.obedience.value:.0f}",
            "camera right (%)": camera,
        },
    )


def _shot(
    folder: Path,
    prompt: DemoPrompt,
    image: torch.Tensor,
    videos: Mapping[Method, torch.Tensor],
    *,
    seed: int,
) -> Shot:
    """Write the videos of a prompt, and measure them."""
    photo = (image.permute(1, 2, 0).numpy() * 255).round().astype(np.uint8)
    return Shot(
        prompt=prompt.program.caption(),
        look_for=what_to_look_for(prompt.program),
        tells_all=bool(prompt.program.actors) and prompt.program.camera_is_captioned,
        photo=jpeg_uri(photo),
        clips=tuple(
            _write_clip(folder, prompt, shown, video, seed=seed) for shown, video in videos.items()
        ),
    )


def _write_clip(
    folder: Path, prompt: DemoPrompt, shown: Method, video: torch.Tensor, *, seed: int
) -> PageClip:
    stem = f"{prompt.photo}-{shown.condition}".replace("+", "plus-")
    path = folder / "videos" / f"{stem}.mp4"
    metadata = {"prompt": prompt.program.caption(), "recipe": shown.recipe, "seed": seed}
    write_video(path, video, fps=FRAME_RATE, metadata=metadata)
    scene = Scene(prompt.program, 0.0, prompt.starts, 0)
    measures = measure_clip(F.adaptive_avg_pool2d(video, SIZE), scene)
    return PageClip(
        title=shown.title,
        video=embed_video(path),
        degree=measures.degree,
        camera=measures.camera_kind,
        disobedience=tuple(disobedience(measures, prompt.program)),
        damage=tuple(damage(measures, prompt.program)),
    )


def demo_image(prompt: DemoPrompt) -> torch.Tensor:
    """Return the photo with the objects painted on it, `[3, 256, 256]` in [0, 1]."""
    photo = fit_image(load_photo(prompt.photo), SIDE, SIDE)
    things = [(actor.color, actor.shape) for actor in prompt.program.actors]
    painted = draw_things(photo, dict(zip(things, prompt.starts, strict=True)))
    return torch.from_numpy(np.array(painted)).permute(2, 0, 1).float() / 255
