"""The training runs behind the shipped pocket weights, each from its inputs to a weights file.

Every file says in its header what made it: the run, its settings and data, loss, time and machine.
"""

from __future__ import annotations

import json
import platform
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from motionmerge.errors import ConfigError
from motionmerge.io.atomic import check_file, prepare_folder
from motionmerge.models.pocket.components import (
    add_pocket_adapter,
    build_pocket_model,
    denoiser_weights,
    load_denoiser,
    load_towers,
    save_half,
    weights_path,
)
from motionmerge.models.pocket.world import TRAINING_PHOTOS
from motionmerge.training.pocket import decoder as pocket_decoder
from motionmerge.training.pocket import towers as pocket_towers
from motionmerge.training.pocket import video as pocket_video
from motionmerge.training.settings import TrainerSettings, TrainingProgress, TrainingResult

OnProgress = Callable[[TrainingProgress], None]
LICENCE = "Apache-2.0"


@dataclass(frozen=True)
class RunInputs:
    """Weights files that a run starts from; the shipped ones where None."""

    towers: Path | None = None
    base: Path | None = None


@dataclass(frozen=True)
class PocketRun:
    """One training run.

    Args:
        summary: One line for `--help` and the model card.
        settings: How to optimize, by default.
        data: Clips and captions, for the video runs.
        trains: For fine-tunes: which parameters; None otherwise.
    """

    summary: str
    settings: TrainerSettings
    data: pocket_video.ClipData | None = None
    trains: pocket_video.Trains | None = None


RUNS: Mapping[str, PocketRun] = {
    "towers": PocketRun("Text and image tower, without video.", pocket_towers.TEXT_SETTINGS),
    "decoder": PocketRun("The autoencoder's decoder.", pocket_decoder.SETTINGS),
    "base": PocketRun(
        "The base: rich motion, weakly coupled to the prompt.",
        pocket_video.BASE_SETTINGS,
        pocket_video.BASE_DATA,
    ),
    "tuned": PocketRun(
        "Stage 1: temporal adapter and U-Net, right captions, mostly slow clips.",
        pocket_video.TUNED_SETTINGS,
        pocket_video.TUNED_DATA,
        trains="adapter and U-Net",
    ),
    "naive": PocketRun(
        "Control: the whole U-Net on the same data, no adapter.",
        pocket_video.TUNED_SETTINGS,
        pocket_video.TUNED_DATA,
        trains="U-Net",
    ),
    "equal": PocketRun(
        "Control: stage 1 on clips as fast as the base's.",
        pocket_video.TUNED_SETTINGS,
        pocket_video.EQUAL_DATA,
        trains="adapter and U-Net",
    ),
    "temporal": PocketRun(
        "Stage 1 on the temporal half alone: adapter and temporal blocks.",
        pocket_video.TUNED_SETTINGS,
        pocket_video.TUNED_DATA,
        trains="adapter and temporal blocks",
    ),
    "temporal-naive": PocketRun(
        "Its control: the temporal blocks on the same data, no adapter.",
        pocket_video.TUNED_SETTINGS,
        pocket_video.TUNED_DATA,
        trains="temporal blocks",
    ),
}


def run(
    name: str,
    output: Path,
    *,
    folder: Path,
    inputs: RunInputs | None = None,
    changes: Mapping[str, Any] | None = None,
    on_progress: OnProgress | None = None,
) -> TrainingResult:
    """Carry out the run `name` and write its weights (fp16) to `output`.

    Args:
        name: One of `RUNS`.
        output: The weights file.
        folder: Resumable state and log.
        inputs: What to start from.
        changes: Fields of `TrainerSettings` other than the run's own.
        on_progress: Called after each logged step.

    Raises:
        ConfigError: the run is unknown, or the output cannot be written.
    """
    if name not in RUNS:
        raise ConfigError(f"There is no run {name!r}", fix=f"Choose one of {', '.join(RUNS)}.")
    recipe = RUNS[name]
    check_file(output)
    prepare_folder(output.parent)
    prepare_folder(folder)
    settings = replace(recipe.settings, **(changes or {}))
    train = {"towers": _towers, "decoder": _decoder}.get(name, _denoiser)
    weights, result = train(name, settings, folder, inputs or RunInputs(), on_progress)
    if result.is_main_process:
        save_half(output, weights, _card(name, recipe, settings, result))
    return result


Trained = tuple[dict[str, torch.Tensor], TrainingResult]


def _towers(
    _: str, settings: TrainerSettings, folder: Path, __: RunInputs, on_progress: OnProgress | None
) -> Trained:
    image_settings = replace(pocket_towers.IMAGE_SETTINGS, seed=settings.seed)
    weights, _text_result, result = pocket_towers.train_towers(
        folder, text_settings=settings, image_settings=image_settings, on_progress=on_progress
    )
    return weights, result


def _decoder(
    _: str, settings: TrainerSettings, folder: Path, __: RunInputs, on_progress: OnProgress | None
) -> Trained:
    return pocket_decoder.train_decoder(folder, settings=settings, on_progress=on_progress)


def _denoiser(
    name: str,
    settings: TrainerSettings,
    folder: Path,
    inputs: RunInputs,
    on_progress: OnProgress | None,
) -> Trained:
    recipe = RUNS[name]
    model = build_pocket_model(with_adapter=name != "base", seed=settings.seed)
    load_towers(model, inputs.towers)
    if name == "base":
        result = pocket_video.train_base(model, folder, settings=settings, on_progress=on_progress)
        add_pocket_adapter(model.unet)
    else:
        load_denoiser(model, inputs.base or weights_path("base"))
        result = pocket_video.fine_tune(
            model,
            folder,
            data=recipe.data or pocket_video.TUNED_DATA,
            settings=settings,
            trains=recipe.trains or "adapter and U-Net",
            on_progress=on_progress,
        )
    return denoiser_weights(model), result


def _card(
    name: str, recipe: PocketRun, settings: TrainerSettings, result: TrainingResult
) -> dict[str, str]:
    card = {
        "model": "motionmerge pocket",
        "run": name,
        "summary": recipe.summary,
        "settings": asdict(settings),
        "data": asdict(recipe.data) if recipe.data else None,
        "trains": recipe.trains,
        "photos": list(TRAINING_PHOTOS),
        "result": {"steps": result.steps, "loss": result.loss, "seconds": round(result.seconds)},
        "machine": f"{platform.machine()}, {result.device}, {result.num_processes} process(es), "
        f"{torch.get_num_threads()} thread(s), torch {torch.__version__}",
        "licence": LICENCE,
    }
    return {"model_card": json.dumps(card)}
