"""Run the pocket model under many conditions on the same prompts and noise, and keep every result.

Each measured clip is one line of `results.jsonl`, under a hash of all that decides it; what is
there already is not computed again. Two processes may work on different conditions in one folder.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from functools import cached_property, lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from motionmerge.errors import DataError
from motionmerge.evaluation.pocket.conditions import Condition
from motionmerge.evaluation.pocket.motion import ClipMeasures, measure_clip
from motionmerge.evaluation.pocket.prompts import DIFFICULTIES, first_frames, scenes
from motionmerge.io.atomic import check_file, prepare_folder
from motionmerge.io.paths import open_plain_file
from motionmerge.io.weights import hash_weights
from motionmerge.merging.inputs.coverage import Missing
from motionmerge.merging.recipes.bound import BoundRecipe
from motionmerge.merging.recipes.recipe import OWN_MODEL, Recipe
from motionmerge.models.pocket.components import weights_path
from motionmerge.models.pocket.world import Canvases, Scene
from motionmerge.rng import generator_for
from motionmerge.switching.expert_bank import experts
from motionmerge.switching.rehearsal import check_fit

RESULTS_FILE = "results.jsonl"
BATCH_SIZE = 24
FORMAT = 2
"""Raise it when a measure changes its meaning: kept results are then not used."""

Progress = Callable[[str, int], None]
"""Called with the condition's name and the number of prompts just finished."""


@dataclass(frozen=True)
class Protocol:
    """What all conditions of an evaluation have in common.

    Args:
        split: `validation` or `test`.
        num: How many prompts.
        seed: Of prompts and noise.
        num_inference_steps: Denoising steps.
    """

    split: str = "test"
    num: int = 200
    seed: int = 0
    num_inference_steps: int = 12


@dataclass(frozen=True, kw_only=True)
class ClipResult:
    """What is kept of one clip.

    Args:
        prompt: Index of the scene in its split.
        degree: Motion degree in pixels, see `motion.motion_degree`.
        camera: Kind of camera move seen.
        camera_right: Whether it is the captioned one; None if the caption is silent.
        obeyed, direction_right, intact, whole, first_frame_db, background_db: See
            `ClipMeasures`.
        difficulty: See `prompts.DIFFICULTIES`.
        camera_moves: Whether the caption leaves the camera free to move.
    """

    prompt: int
    degree: float
    camera: str
    camera_right: bool | None
    obeyed: bool
    direction_right: float
    intact: bool
    whole: bool
    first_frame_db: float
    background_db: float
    difficulty: str
    camera_moves: bool

    @property
    def did_all(self) -> bool:
        """Whether objects and camera do what the prompt says of them."""
        return self.obeyed and self.camera_right is not False


@dataclass(frozen=True)
class ConditionResults:
    """All clips of one condition, as arrays over prompts in the order of the split."""

    condition: Condition
    clips: tuple[ClipResult, ...]

    def column(self, name: str) -> npt.NDArray[np.float64]:
        """Return one measure of all clips, `[prompts]`."""
        if name not in self._columns:
            values = [getattr(clip, name) for clip in self.clips]
            self._columns[name] = np.array(values, dtype=np.float64)
        return self._columns[name]

    @cached_property
    def _columns(self) -> dict[str, npt.NDArray[np.float64]]:
        """The columns asked for so far; a bootstrap asks thousands of times."""
        return {}

    @cached_property
    def moving(self) -> npt.NDArray[np.bool_]:
        """Prompts on which motion degree is measured, `[prompts]`."""
        return np.array([clip.camera_moves for clip in self.clips])

    @property
    def demanding(self) -> npt.NDArray[np.bool_]:
        """Prompts with a move that turns or with several objects, `[prompts]`."""
        return np.array([clip.difficulty != DIFFICULTIES[0] for clip in self.clips])

    @property
    def degree(self) -> float:
        """Mean motion degree in pixels, over the prompts whose camera is free to move."""
        return float(self.column("degree")[self.moving].mean())

    @property
    def obedience(self) -> float:
        """Share of clips in which every object does all it was told."""
        return float(self.column("obeyed").mean())

    @property
    def intact(self) -> float:
        """Share of clips with all objects still there, once each."""
        return float(self.column("intact").mean())


def evaluate(
    pipeline: Any,
    conditions: Sequence[Condition],
    *,
    protocol: Protocol,
    folder: Path,
    inputs: Mapping[str, str | Path] | None = None,
    progress: Progress | None = None,
    missing: Missing = "error",
) -> dict[str, ConditionResults]:
    """Measure conditions, using what is in the folder already.

    Args:
        pipeline: A `PocketPipeline`; its own weights do not matter.
        conditions: What to run.
        protocol: Prompts, noise and steps: the same for all conditions.
        folder: Where `results.jsonl` is.
        inputs: Weights files instead of the shipped ones, by name.
        progress: Told of every finished batch, also of prompts found in the folder.
        missing: As for `experts`: tensors that not all of the weights have.

    Returns:
        Results by the condition's name, in the order given.

    Raises:
        ConfigError: The folder cannot be written to.
        CheckpointError, ShapeError: Weights do not fit the model, which is found before any run.
    """
    if missing == "error":
        _check_inputs(pipeline, conditions, inputs)
    results = {}
    run = KeptRun(pipeline, folder)
    for condition in conditions:
        own = _used(condition, inputs)
        key = _key(condition, protocol, inputs or {}, frozen=run.frozen, missing=missing)
        clips = run.clips(
            partial(experts, pipeline, recipe=condition.recipe(), inputs=own, missing=missing),
            name=condition.name,
            key=key,
            protocol=protocol,
            progress=progress,
        )
        results[condition.name] = ConditionResults(condition, clips)
    return results


class KeptRun:
    """Clips of a pocket pipeline, each made and measured once and kept in a folder.

    Args:
        pipeline: A `PocketPipeline`.
        folder: Where `results.jsonl` is.

    Raises:
        ConfigError: The folder cannot be written to.
    """

    def __init__(self, pipeline: Any, folder: Path) -> None:
        self._pipeline, self._path = pipeline, folder / RESULTS_FILE
        prepare_folder(folder)
        check_file(self._path)
        self._kept = read_results(self._path)
        self.frozen = _hash_frozen_parts(pipeline)

    def num_kept(self, key: str) -> int:
        """Return how many clips under a key are there."""
        return len(self._kept.get(key, {}))

    def clips(
        self,
        attach: Callable[[], AbstractContextManager[object]],
        *,
        name: str,
        key: str,
        protocol: Protocol,
        progress: Progress | None = None,
    ) -> tuple[ClipResult, ...]:
        """Return the clips of a set of weights, in the order of the prompts.

        Args:
            attach: Returns a context in which these weights denoise.
            name: Of the weights, in the file.
            key: Hash of all that decides the results, see `ClipResult`.
            protocol: Prompts, noise and steps.
            progress: Told of every finished batch, also of prompts found in the folder.
        """
        found = {i: clip for i, clip in self._kept.get(key, {}).items() if i < protocol.num}
        if progress is not None and found:
            progress(name, len(found))
        todo = [index for index in range(protocol.num) if index not in found]
        if todo:
            chosen, canvases = _scenes(protocol.split, protocol.num, protocol.seed)
            with attach():
                for start in range(0, len(todo), BATCH_SIZE):
                    batch = todo[start : start + BATCH_SIZE]
                    clips = _run_batch(self._pipeline, batch, chosen, canvases, protocol)
                    _append(self._path, key, name, clips)
                    found |= {clip.prompt: clip for clip in clips}
                    if progress is not None:
                        progress(name, len(batch))
            self._kept.setdefault(key, {}).update(found)
        return tuple(found[index] for index in range(protocol.num))


@lru_cache(maxsize=2)
def _scenes(split: str, num: int, seed: int) -> tuple[list[Scene], Canvases]:
    """Draw the scenes once for all sets of weights."""
    return scenes(split, num=num, seed=seed)


def generate(
    pipeline: Any,
    images: torch.Tensor,
    prompts: Sequence[str],
    *,
    names: Sequence[str],
    **options: Any,
) -> torch.Tensor:
    """Make videos whose noise depends on their name only: `[num, 16, 3, height, width]` in [0, 1].

    Args:
        pipeline: A `PocketPipeline`.
        images: `[num, 3, height, width]` in [0, 1].
        prompts: One for each image.
        names: Key of each video's noise, e.g. `"test/0/17"`.
        options: Of the pipeline.
    """
    noise = [generator_for(0, "evaluation", name) for name in names]
    pipeline.set_progress_bar_config(disable=True)
    return pipeline(
        image=images, prompt=list(prompts), generator=noise, output_type="pt", **options
    ).frames


def _run_batch(
    pipeline: Any,
    batch: Sequence[int],
    chosen: Sequence[Scene],
    canvases: Canvases,
    protocol: Protocol,
) -> list[ClipResult]:
    images = first_frames([chosen[index] for index in batch], canvases)
    videos = generate(
        pipeline,
        images,
        [chosen[index].program.caption() for index in batch],
        names=[f"{protocol.split}/{protocol.seed}/{index}" for index in batch],
        num_inference_steps=protocol.num_inference_steps,
    )
    return [
        clip_result(index, chosen[index], measure_clip(video, chosen[index], image=image))
        for index, video, image in zip(batch, videos, images, strict=True)
    ]


def clip_result(index: int, scene: Scene, measures: ClipMeasures) -> ClipResult:
    """Keep what counts of a clip's measures."""
    program = scene.program
    told = program.camera_is_captioned
    return ClipResult(
        prompt=index,
        degree=measures.degree,
        camera=measures.camera_kind,
        camera_right=measures.camera_kind == program.camera if told else None,
        obeyed=measures.obeyed,
        direction_right=measures.direction_right,
        intact=measures.intact,
        whole=measures.whole,
        first_frame_db=measures.first_frame_db,
        background_db=measures.background_db,
        difficulty=program.difficulty,
        camera_moves=not (told and program.camera == "rests"),
    )


def read_results(path: Path) -> dict[str, dict[int, ClipResult]]:
    """Read a results file: clips by condition key and prompt.

    A line that was torn by a crash is left out, so that its clip is made again; so is one of an
    older version that lacks a measure.

    Raises:
        DataError: It cannot be read.
    """
    kept: dict[str, dict[int, ClipResult]] = {}
    if not path.exists():
        return kept
    try:
        with open_plain_file(path) as file:
            lines = file.read().decode(errors="replace").split("\n")
    except OSError as error:
        raise DataError(f"Cannot read {path}: {error}", fix="Remove it, or correct it.") from error
    for line in lines:
        try:
            entry = json.loads(line)
            clip = ClipResult(**entry["clip"])
            kept.setdefault(entry["key"], {})[clip.prompt] = clip
        except (ValueError, TypeError, KeyError, RecursionError):
            continue
    return kept


def _append(path: Path, key: str, name: str, clips: Iterable[ClipResult]) -> None:
    lines = [
        json.dumps({"key": key, "condition": name, "clip": asdict(clip)}, sort_keys=True) + "\n"
        for clip in clips
    ]
    is_torn = path.exists() and path.stat().st_size > 0 and path.read_bytes()[-1:] != b"\n"
    with path.open("a", encoding="utf-8") as file:
        file.write("\n" * is_torn + "".join(lines))


def _used(
    condition: Condition, inputs: Mapping[str, str | Path] | None
) -> dict[str, str | Path] | None:
    needed = condition.recipe().inputs
    return {name: path for name, path in (inputs or {}).items() if name in needed} or None


def _check_inputs(
    pipeline: Any, conditions: Sequence[Condition], inputs: Mapping[str, str | Path] | None
) -> None:
    """Refuse weights that are no weights of the model, each by itself."""
    modules = {"unet": pipeline.unet, "image_projector": pipeline.image_projector}
    used: dict[str, str | Path] = {}
    for condition in conditions:
        used |= _used(condition, inputs) or {}
    for name in used:
        alone = {"inputs": {name: OWN_MODEL}, "experts": {name: name}}
        recipe = BoundRecipe.of(Recipe.from_sections(alone), {name: used[name]})
        check_fit(recipe, modules)


def _key(
    condition: Condition,
    protocol: Protocol,
    inputs: Mapping[str, str | Path],
    *,
    frozen: str,
    missing: Missing,
) -> str:
    weights = {
        name: _hash_file(Path(inputs[name]) if name in inputs else weights_path(name))
        for name in condition.recipe().inputs
    }
    return condition.fingerprint(
        format=FORMAT,
        weights=weights,
        frozen=frozen,
        split=protocol.split,
        seed=protocol.seed,
        steps=protocol.num_inference_steps,
        **({} if missing == "error" else {"missing": missing}),
    )


@lru_cache
def _hash_file(path: Path) -> str:
    return hash_weights(path)


def _hash_frozen_parts(pipeline: Any) -> str:
    """Hash of what all conditions share: towers and decoder."""
    digest = hashlib.sha256()
    for part in (pipeline.text_encoder, pipeline.image_encoder, pipeline.vae):
        for tensor in part.state_dict().values():
            digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
