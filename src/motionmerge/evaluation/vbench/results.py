"""Result files: VBench's own JSON, read and written; scores of FastVideo, read.

VBench's total script fails on a file that holds temporal_flickering beside the other dimensions,
so that dimension is written into a file of its own.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from motionmerge.errors import DataError
from motionmerge.evaluation.vbench.run import DimensionRow
from motionmerge.evaluation.vbench.suite import CAMERA_MOVES, SuiteClip
from motionmerge.evaluation.vbench.total import DIMENSIONS, IN_NO_TOTAL, UNBOUNDED
from motionmerge.io.atomic import write_whole
from motionmerge.io.json_file import load_json

_SUFFIX = "_eval_results.json"
_MOST_BYTES = 256 << 20
_FASTVIDEO = "vbench."
_ROUNDING = 1e-6
_OF_CLIPS = ("subject_consistency", "background_consistency")


@dataclass(frozen=True)
class Score:
    """A dimension's score over all clips.

    Attributes:
        dimension: Its name.
        score: As VBench aggregates it, in 0..1; None if no clip could be measured.
        rows: The clips that count.
        faults: The clips that do not, and why.
    """

    dimension: str
    score: float | None
    rows: Sequence[DimensionRow]
    faults: Mapping[str, str]


def aggregate(rows: Iterable[DimensionRow]) -> dict[str, Score]:
    """Average rows as VBench does: the two consistencies over frames, all else over clips."""
    sorted_rows: dict[str, list[DimensionRow]] = {}
    for row in rows:
        sorted_rows.setdefault(row.dimension, []).append(row)
    return {name: _score(name, sorted_rows[name]) for name in DIMENSIONS if name in sorted_rows}


def _score(dimension: str, rows: Sequence[DimensionRow]) -> Score:
    good = [row for row in rows if row.value is not None]
    faults = {
        row.video: str(row.details.get("fault", "no value")) for row in rows if row.value is None
    }
    if not good:
        return Score(dimension, None, (), faults)
    if dimension in _OF_CLIPS:
        frames = sum(row.details["cnt_per_video"] for row in good)
        value = math.fsum(row.details["video_sim"] for row in good) / frames
    else:
        value = math.fsum(row.value for row in good if row.value is not None) / len(good)
    return Score(dimension, value / 100 if dimension == "imaging_quality" else value, good, faults)


def vbench_json(scores: Mapping[str, Score], clips: Sequence[SuiteClip]) -> dict[str, list[Any]]:
    """Return scores in the layout of VBench's own result file.

    camera_motion lists only the moves that have a clip; VBench writes NaN for the others, which is
    not JSON.
    """
    by_name = {clip.path.name: clip for clip in clips}
    found: dict[str, list[Any]] = {}
    for name, score in scores.items():
        if score.score is None:
            continue
        videos = [_video(row, by_name.get(row.video)) for row in score.rows]
        middle = [_moves(score.rows)] if name == "camera_motion" else []
        found[name] = [score.score, *middle, videos]
    return found


def _video(row: DimensionRow, clip: SuiteClip | None) -> dict[str, Any]:
    value: float | bool | None = row.value
    if row.dimension == "dynamic_degree":
        value = bool(row.value)
    path = str(clip.path) if clip is not None else row.video
    entry = {"video_path": path, "video_results": value, **row.details}
    if row.dimension.startswith("i2v_") and clip is not None and clip.image is not None:
        entry["image_path"] = str(clip.image)
    return entry


def _moves(rows: Sequence[DimensionRow]) -> dict[str, float]:
    values: dict[str, list[float]] = {}
    for row in rows:
        values.setdefault(row.details["prompt_type"], []).append(row.value or 0.0)
    return {
        move: sum(values[move]) / len(values[move])
        for move in CAMERA_MOVES.values()
        if move in values
    }


def write_vbench(folder: Path, name: str, results: Mapping[str, list[Any]]) -> list[Path]:
    """Write `NAME_eval_results.json`, and temporal_flickering into a file of its own.

    Returns:
        The files, without one that would be empty.

    Raises:
        DataError: A file cannot be written.
    """
    parts = {
        f"{name}{_SUFFIX}": {k: v for k, v in results.items() if k != IN_NO_TOTAL},
        f"{name}_{IN_NO_TOTAL}{_SUFFIX}": {k: v for k, v in results.items() if k == IN_NO_TOTAL},
    }
    written = []
    for file, content in parts.items():
        if content:
            write_whole(folder / file, json.dumps(content, indent=4, allow_nan=False))
            written.append(folder / file)
    return written


def results_in(folder: Path, name: str) -> list[Path]:
    """List the files of a folder that `write_vbench` would write under this name."""
    names = (f"{name}{_SUFFIX}", f"{name}_{IN_NO_TOTAL}{_SUFFIX}")
    return [folder / one for one in names if (folder / one).exists()]


def read_scores(paths: Iterable[Path]) -> dict[str, float]:
    """Read raw scores in 0..1 from result files of VBench or FastVideo, or folders of such.

    Raises:
        DataError: A file is neither, holds a score that is no number, or two files hold the same
            dimension with different scores.
    """
    scores: dict[str, float] = {}
    for path in paths:
        files = sorted(path.glob(f"*{_SUFFIX}")) if path.is_dir() else [path]
        if not files:
            raise DataError(f"{path} holds no *{_SUFFIX}.", fix="Give the result files.")
        for file in files:
            for name, score in _scores_of(file).items():
                if scores.setdefault(name, score) != score:
                    raise DataError(
                        f"{file} gives {name} as {score}, another file as {scores[name]}.",
                        fix="Give the files of one method.",
                    )
    return scores


def _scores_of(path: Path) -> dict[str, float]:
    try:
        value = load_json(path, most_bytes=_MOST_BYTES)
        found = _of_fastvideo(value) if isinstance(value, list) else _of_vbench(value)
        if not found:
            raise ValueError("it holds no dimension")
    except (
        *(OSError, ValueError, TypeError, KeyError, AttributeError),
        *(RecursionError, OverflowError),
    ) as error:
        raise DataError(
            f"{path} is no result file: {str(error)[:200]}",
            fix=f"Give VBench's *{_SUFFIX}, or FastVideo's file of scores.",
        ) from error
    return found


def _of_vbench(value: Mapping[str, Any]) -> dict[str, float]:
    found = {}
    for name, content in value.items():
        if name not in DIMENSIONS or not isinstance(content, list) or not content:
            raise ValueError(f"`{str(name)[:60]}` is no dimension with a score")
        found[name] = _score_in(name, content[0])
    return found


def _score_in(name: str, score: object) -> float:
    """Check that a dimension's score is a number, and in 0..1 where its rule keeps it there."""
    if isinstance(score, bool) or not isinstance(score, (int, float)) or score != score:
        raise ValueError(f"{name} is no number but {str(score)[:40]!r}")
    low, high = (-sys.float_info.max, sys.float_info.max) if name == UNBOUNDED else (0.0, 1.0)
    if not low - _ROUNDING <= score <= high + _ROUNDING:
        raise ValueError(f"{name} is {str(score)[:40]}, and a score is between 0 and 1")
    return float(score)


def _of_fastvideo(value: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Average FastVideo's scores over videos; it measures no i2v dimension and no camera."""
    each: dict[str, list[float]] = {}
    for video in value:
        for name, result in video["scores"].items():
            dimension = name.removeprefix(_FASTVIDEO)
            if name.startswith(_FASTVIDEO) and dimension in DIMENSIONS:
                score = result["score"]
                if score is not None:  # a metric that was skipped
                    each.setdefault(dimension, []).append(_score_in(dimension, score))
    return {name: math.fsum(scores) / len(scores) for name, scores in each.items()}
