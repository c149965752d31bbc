"""The demo: bundled photos through every stage of the method, side by side on one page."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.nn import functional as F

from motionmerge.errors import ConfigError
from motionmerge.evaluation.figures import to_svg
from motionmerge.evaluation.flow import Picture, flow_legend, flow_picture, shared_scale, video_flow
from motionmerge.evaluation.pocket.charts import KNOB_COLORS, knob_chart
from motionmerge.evaluation.pocket.conditions import (
    Condition,
    best_condition,
    knob,
    method,
    pick_conditions,
)
from motionmerge.evaluation.pocket.motion import FloatArray, measure_clip
from motionmerge.evaluation.pocket.report import (
    Method,
    Numbers,
    Page,
    PageClip,
    Shot,
    write_demo_page,
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

PAGE_FILE, SHEET_FILE, ANIMATION_FILE = "index.html", "sheet.jpg", "typical.webp"
SIDE = 256  # pixels, of the videos
NUM_TABLE_PROMPTS = 24
KNOB_EXTRAS = (-0.5, 1.0)
FLOW_PAIRS = ((0, 3), (6, 9), (12, 15))

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
    full = best_condition() or method()
    return [
        _stage("Base", "the pretrained model", base),
        _stage("Naive", "fine-tuned without the adapter", naive),
        _stage("Tuned", "stage 1: fine-tuned with text in time", tuned),
        _stage("Extrapolated", "stage 2: away from tuned, α = 0.5", knob(0.5)),
        _stage("Full method", "stage 3: two experts by noise level", full),
        _stage("Reversed", "the two experts swapped", full.reversed()),
    ]


def _stage(title: str, note: str, condition: Condition) -> tuple[Method, Condition]:
    recipe = condition.recipe()
    schedule = recipe.schedule.draw() if recipe.schedule else ""
    return Method(
        title=title, note=note, condition=condition.name, recipe=recipe.print(), schedule=schedule
    ), condition


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
    tell("optical flow")
    flows = {
        (name, index): video_flow(video, pairs=FLOW_PAIRS)
        for name, batch in videos.items()
        for index, video in enumerate(batch)
    }
    scale = shared_scale(flows.values())
    tell("mp4s")
    shots = []
    for index, prompt in enumerate(chosen):
        picture = f"images/{prompt.photo}.jpg"
        _save(folder / picture, (_channels_last(images[index]) * 255).round().astype(np.uint8))
        clips = [
            _write_clip(
                folder,
                prompt,
                shown,
                videos[shown.condition][index],
                flows[shown.condition, index],
                scale=scale,
                seed=seed,
            )
            for shown, _ in stages
        ]
        shots.append(
            Shot(
                prompt=prompt.program.caption(),
                look_for=what_to_look_for(prompt.program),
                tells_all=bool(prompt.program.actors) and prompt.program.camera_is_captioned,
                photo=prompt.photo,
                picture=picture,
                clips=tuple(clips),
            )
        )
    _save(folder / "images" / "flow-legend.png", flow_legend())
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
    page = Page(
        methods=tuple(shown for shown, _ in stages),
        shots=tuple(shots),
        result=result_sentence(of["Full method"], of["Tuned"]),
        rows=tuple(_numbers(title, results) for title, results in of.items()),
        num_table_prompts=num_table_prompts,
        flow_scale=scale,
        knob_svg=to_svg(knob_chart(measured), variables=KNOB_COLORS),
        seed=seed,
    )
    return write_demo_page(page, folder / PAGE_FILE)


def _check_outputs(folder: Path) -> None:
    """Make the folders, and refuse before any video is made what cannot be written."""
    for inner in ("", "images", "videos"):
        prepare_folder(folder / inner)
    for name in (PAGE_FILE, SHEET_FILE, ANIMATION_FILE, RESULTS_FILE):
        check_file(folder / name)


def _numbers(title: str, results: ConditionResults) -> Numbers:
    row = table_row(results)
    return Numbers(
        title=title,
        degree=row.degree,
        obeys=share_of([clip.did_all for clip in results.clips]),
        whole=share_of([clip.whole for clip in results.clips]),
        objects_right=row.obedience,
        camera_right=row.camera_right,
    )


def _write_clip(
    folder: Path,
    prompt: DemoPrompt,
    shown: Method,
    video: torch.Tensor,
    flow: FloatArray,
    *,
    scale: float,
    seed: int,
) -> PageClip:
    stem = f"{prompt.photo}-{shown.condition}".replace("+", "plus-")
    caption = prompt.program.caption()
    write_video(
        folder / "videos" / f"{stem}.mp4",
        video,
        fps=FRAME_RATE,
        metadata={"prompt": caption, "recipe": shown.recipe, "seed": seed},
    )
    strip = np.concatenate([flow_picture(field, scale=scale) for field in flow], axis=1)
    _save(folder / "images" / f"{stem}-flow.jpg", strip[::2, ::2])
    scene = Scene(prompt.program, 0.0, prompt.starts, 0)
    measures = measure_clip(F.adaptive_avg_pool2d(video, SIZE), scene)
    return PageClip(
        title=shown.title,
        video=f"videos/{stem}.mp4",
        flow=f"images/{stem}-flow.jpg",
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


def _channels_last(image: torch.Tensor) -> FloatArray:
    return image.permute(1, 2, 0).numpy()


def _save(path: Path, picture: Picture) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(picture).save(path, quality=90)
