"""The demo's prompts that show what the numbers say, as a contact sheet and as an animation.

They are chosen by a rule from the badges of all clips, not by eye.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch.nn import functional as F

from motionmerge.evaluation.pocket.report import PageClip, Shot
from motionmerge.evaluation.pocket.runs import ConditionResults
from motionmerge.evaluation.pocket.verdicts import share
from motionmerge.io.atomic import atomic_path
from motionmerge.io.video import contact_sheet, eight_bit
from motionmerge.models.pocket.world import FRAME_RATE

STAGES = ("Base", "Tuned", "Full method")
NUM_PROMPTS, SHEET_EVERY = 2, 3  # how many of the prompts, and of the frames
_BAND, _GAP, _FONT_SIZE = 26, 8, 13  # pixels of the animation
_DARK, _LIGHT = (32, 35, 41), (236, 238, 241)
_QUALITY = 75


def typical_shots(shots: Sequence[Shot], measured: Mapping[str, ConditionResults]) -> list[int]:
    """Choose the prompts that are most like the held-out ones, the best first.

    Counted are the badges under `STAGES` that differ from those of most held-out clips of the same
    stage. The prompts with the fewest win, of equal ones the first. Prompts that leave the camera
    or the objects out come last, as half of the badges means nothing there.

    Args:
        shots: The prompts with their clips.
        measured: Results on held-out prompts, by the stage's title.

    Returns:
        Indices of `NUM_PROMPTS` shots, or of all if there are fewer.
    """

    def oddness(index: int) -> tuple[bool, int]:
        shot = shots[index]
        badges = [(clip, measured[clip.title]) for clip in shot.clips if clip.title in STAGES]
        odd = sum(
            (not clip.disobedience) != (share(results, "did_all") > 0.5) for clip, results in badges
        ) + sum((not clip.damage) != (share(results, "whole") > 0.5) for clip, results in badges)
        return not shot.tells_all, odd

    return sorted(range(len(shots)), key=oddness)[:NUM_PROMPTS]


def write_sheet(
    path: Path, shots: Sequence[Shot], videos: Sequence[Mapping[str, torch.Tensor]]
) -> None:
    """Write frames of some prompts under the main stages, one clip a row.

    Args:
        path: The JPEG to write.
        shots: The prompts.
        videos: Of each prompt, by the stage's title.
    """
    rows = {
        f"{title}: {shot.prompt}": F.avg_pool2d(of[title], 2)
        for shot, of in zip(shots, videos, strict=True)
        for title in STAGES
    }
    sheet = contact_sheet(list(rows.values()), labels=list(rows), every=SHEET_EVERY)
    with atomic_path(path) as temporary:
        sheet.save(temporary, format="JPEG", quality=90)


def write_animation(path: Path, shot: Shot, videos: Mapping[str, torch.Tensor]) -> None:
    """Write one prompt under the main stages as an animated WebP, with the badges in words."""
    clips = {clip.title: clip for clip in shot.clips}
    rows = [eight_bit(videos[title]) for title in STAGES]
    side = rows[0].shape[1]
    font = ImageFont.load_default(_FONT_SIZE)
    frames = []
    for pictures in zip(*rows, strict=True):
        frame = Image.new("RGB", (len(STAGES) * (side + _GAP) - _GAP, side + _BAND), _DARK)
        draw = ImageDraw.Draw(frame)
        for column, (title, picture) in enumerate(zip(STAGES, pictures, strict=True)):
            left = column * (side + _GAP)
            draw.text((left + 4, 4), _label(clips[title]), fill=_LIGHT, font=font)
            frame.paste(Image.fromarray(np.ascontiguousarray(picture)), (left, _BAND))
        frames.append(frame)
    durations = [1000 // FRAME_RATE] * len(frames)
    durations[-1] = 1000  # time to look at where everything has come to
    with atomic_path(path) as temporary:
        frames[0].save(
            temporary,
            format="WEBP",
            save_all=True,
            append_images=frames[1:],
            duration=durations,
            loop=0,
            quality=_QUALITY,
        )


def _label(clip: PageClip) -> str:
    does = "disobeys" if clip.disobedience else "obeys"
    return f"{clip.title}: {clip.degree:.1f} px, {does}, {'breaks' if clip.damage else 'whole'}"
