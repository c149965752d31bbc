"""The training runs behind the shipped pocket weights, each from its inputs to a weights file.

Every file says in its header what made it: the run, its settings and data, loss, time and machine.
"""

from __future__ import annotations

import json
import platform
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Literal

import torch
from pydantic import model_validator

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
from motionmerge.training.config_file import ConfigSection
from motionmerge.training.pocket import decoder as pocket_decoder
from motionmerge.training.pocket import towers as pocket_towers
from motionmerge.training.pocket import video as pocket_video
from motionmerge.training.settings import TrainerSettings, TrainingProgress, TrainingResult
from motionmerge.training.while_training import check_free

OnProgress = Callable[[TrainingProgress], None]
LICENCE = "Apache-2.0"


class PocketRun(ConfigSection):
    """One training run.

    Attributes:
        summary: One line for `--help` and the model card.
        pocket: What is trained; `fine-tune` begins with a base.
        trains: For fine-tunes: which parameters.
        data: Clips and captions, for the video runs.
        settings: How to optimize.
        image_settings: The same for the image tower.
        towers, base: Weights files to start from; the shipped ones by default.
        output: The folder of the run: states, log, and the weights.
    """

    summary: str
    pocket: Literal["towers", "decoder", "base", "fine-tune"]
    trains: pocket_video.Trains | None = None
    data: pocket_video.ClipData | None = None
    settings: TrainerSettings
    image_settings: TrainerSettings | None = None
    towers: Path | None = None
    base: Path | None = None
    output: Path

    @model_validator(mode="after")
    def _check_parts(self) -> PocketRun:
        wanted = {
            "data": self.pocket in ("base", "fine-tune"),
            "trains": self.pocket == "fine-tune",
            "image_settings": self.pocket == "towers",
        }
        for name, is_wanted in wanted.items():
            if (getattr(self, name) is not None) != is_wanted:
                raise ConfigError(
                    f"`{name}` is {'needed' if is_wanted else 'not'} for {self.pocket}.",
                    fix=f"{'Add' if is_wanted else 'Remove'} `{name}`.",
                )
        return self


def run(name: str, config: PocketRun, *, on_progress: OnProgress | None = None) -> TrainingResult:
    """Carry out a run and write its weights (fp16) to `weights_of(name, config)`.

    Args:
        name: Of the run, for the model card.
        config: What it is.
        on_progress: Called after each logged step.

    Raises:
        ConfigError: The output cannot be written, or is a file that no run wrote.
    """
    output = weights_of(name, config)
    check_file(output)
    check_free(config.output, [output.name], run=folders_of(config)[-1])
    prepare_folder(config.output)
    train = {"towers": _towers, "decoder": _decoder}.get(config.pocket, _denoiser)
    weights, result = train(config, on_progress)
    if result.is_main_process:
        save_half(output, weights, _card(name, config, result))
    return result


def folders_of(config: PocketRun) -> list[Path]:
    """Return the folders in which a run keeps states: of the towers, each has its own."""
    if config.pocket == "towers":
        return [config.output / "text", config.output / "image"]
    return [config.output]


def weights_of(name: str, config: PocketRun) -> Path:
    """Return the weights file that a run writes."""
    return config.output / f"{name}.safetensors"


Trained = tuple[dict[str, torch.Tensor], TrainingResult]


def _towers(config: PocketRun, on_progress: OnProgress | None) -> Trained:
    assert config.image_settings is not None  # see `PocketRun`
    weights, _text_result, result = pocket_towers.train_towers(
        config.output,
        text_settings=config.settings,
        image_settings=replace(config.image_settings, seed=config.settings.seed),
        on_progress=on_progress,
    )
    return weights, result


def _decoder(config: PocketRun, on_progress: OnProgress | None) -> Trained:
    return pocket_decoder.train_decoder(
        config.output, settings=config.settings, on_progress=on_progress
    )


def _denoiser(config: PocketRun, on_progress: OnProgress | None) -> Trained:
    assert config.data is not None  # see `PocketRun`
    settings = config.settings
    model = build_pocket_model(with_adapter=config.pocket != "base", seed=settings.seed)
    load_towers(model, config.towers)
    if config.trains is None:
        result = pocket_video.train_base(
            model, config.output, data=config.data, settings=settings, on_progress=on_progress
        )
        add_pocket_adapter(model.unet)
    else:
        load_denoiser(model, config.base or weights_path("base"))
        result = pocket_video.fine_tune(
            model,
            config.output,
            data=config.data,
            settings=settings,
            trains=config.trains,
            on_progress=on_progress,
        )
    return denoiser_weights(model), result


def _card(name: str, config: PocketRun, result: TrainingResult) -> dict[str, str]:
    card = {
        "model": "motionmerge pocket",
        "run": name,
        "summary": config.summary,
        "settings": asdict(config.settings),
        "data": asdict(config.data) if config.data else None,
        "trains": config.trains,
        "photos": list(TRAINING_PHOTOS),
        "result": {"steps": result.steps, "loss": result.loss, "seconds": round(result.seconds)},
        "machine": f"{platform.machine()}, {result.device}, {result.num_processes} process(es), "
        f"{torch.get_num_threads()} thread(s), torch {torch.__version__}",
        "licence": LICENCE,
    }
    return {"model_card": json.dumps(card)}
