"""Train the pocket model's towers: read captions and pictures of the world, without any video.

Six queries (one a color, one for the camera) read a tower's tokens and must say, from a caption,
which object does what in which half and what the camera does; from a picture, which object of that
color lies where. The queries are thrown away afterwards, the towers are kept and frozen.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from motionmerge.models.pocket.components import attention_kernel
from motionmerge.models.pocket.language import (
    CAMERA_MOVES,
    COLORS,
    DIRECTIONS,
    SHAPES,
    Program,
    sample_program,
)
from motionmerge.models.pocket.text import PocketTokenizer
from motionmerge.models.pocket.towers import (
    WIDTH,
    build_image_encoder,
    build_text_encoder,
    normalize_image,
)
from motionmerge.models.pocket.world import (
    SIZE,
    TRAINING_PHOTOS,
    Canvases,
    Scene,
    render,
    sample_scene,
)
from motionmerge.training.objective import FunctionObjective
from motionmerge.training.settings import TrainerSettings, TrainingProgress, TrainingResult
from motionmerge.training.trainer import fit


class Reader(nn.Module):
    """A tower and the queries that read it."""

    def __init__(self, tower: nn.Module, *, actor_outputs: int, camera_outputs: int) -> None:
        super().__init__()
        self.tower = tower
        self.queries = nn.Parameter(torch.randn(1, len(COLORS) + 1, WIDTH))
        self.attention = nn.MultiheadAttention(WIDTH, 4, batch_first=True)
        self.actor_head = nn.Linear(WIDTH, actor_outputs)
        self.camera_head = nn.Linear(WIDTH, camera_outputs)

    def forward(self, inputs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        tokens = self.tower(inputs).last_hidden_state
        queries = self.queries.expand(len(tokens), -1, -1)
        answers = self.attention(queries, tokens, tokens, need_weights=False)[0]
        return self.actor_head(answers[:, :-1]), self.camera_head(answers[:, -1])


def program_targets(programs: Sequence[Program]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return what captions say of objects and of the camera, as classes.

    Returns:
        `[batch, colors, 3]` (shape, first and second direction; 0 = absent), and the camera's move
        `[batch]` (0 = not said).
    """
    actors = torch.zeros(len(programs), len(COLORS), 3, dtype=torch.long)
    camera = torch.zeros(len(programs), dtype=torch.long)
    for row, program in enumerate(programs):
        for actor in program.actors:
            classes = [SHAPES.index(actor.shape), *map(DIRECTIONS.index, actor.phases)]
            actors[row, COLORS.index(actor.color)] = torch.tensor(classes) + 1
        if program.camera_is_captioned:
            camera[row] = CAMERA_MOVES.index(program.camera) + 1
    return actors, camera


def text_loss(reader: nn.Module, indices: Sequence[int], *, seed: int) -> torch.Tensor:
    """Compute the cross-entropy of what captions say, and the share of each part read wrongly."""
    programs = [
        sample_program(np.random.default_rng((seed, 1, i)), actor_shares=(0.1, 0.4, 0.5))
        for i in indices
    ]
    actors, camera = program_targets(programs)
    actor_logits, camera_logits = reader(PocketTokenizer()([p.caption() for p in programs]))
    parts = actor_logits.split((len(SHAPES) + 1, len(DIRECTIONS) + 1, len(DIRECTIONS) + 1), -1)
    losses = [
        F.cross_entropy(p.flatten(0, 1), actors[..., i].flatten()) for i, p in enumerate(parts)
    ]
    return sum(losses, F.cross_entropy(camera_logits, camera))


def image_loss(
    reader: nn.Module, indices: Sequence[int], *, seed: int, canvases: Canvases
) -> torch.Tensor:
    """Compute the cross-entropy of each color's shape, and the squared error of where it lies."""
    scenes = []
    for i in indices:
        rng = np.random.default_rng((seed, 2, i))
        program = sample_program(rng, actor_shares=(0.1, 0.4, 0.5))
        scenes.append(sample_scene(rng, num_canvases=len(canvases), program=program))
    pictures = render(scenes, canvases, np.zeros(1)).video[:, 0]
    shapes, places = _places(scenes)
    answers, _ = reader(normalize_image(pictures))
    shape_loss = F.cross_entropy(answers[..., :3].flatten(0, 1), shapes.flatten())
    there = shapes > 0
    return shape_loss + 4 * F.mse_loss(answers[..., 3:][there], places[there])


def _places(scenes: Sequence[Scene]) -> tuple[torch.Tensor, torch.Tensor]:
    shapes = torch.zeros(len(scenes), len(COLORS), dtype=torch.long)
    places = torch.zeros(len(scenes), len(COLORS), 2)
    for row, scene in enumerate(scenes):
        for actor, start in zip(scene.program.actors, scene.starts, strict=True):
            column = COLORS.index(actor.color)
            shapes[row, column] = SHAPES.index(actor.shape) + 1
            places[row, column] = torch.tensor(start) / (SIZE / 2) - 1
    return shapes, places


def train_towers(
    folder: Path,
    *,
    text_settings: TrainerSettings,
    image_settings: TrainerSettings,
    on_progress: Callable[[TrainingProgress], None] | None = None,
) -> tuple[dict[str, torch.Tensor], TrainingResult, TrainingResult]:
    """Train both towers; returns their weights as `text_encoder.*` and `image_encoder.*`."""
    seed = text_settings.seed
    torch.manual_seed(seed)
    text = Reader(
        build_text_encoder(),
        actor_outputs=len(SHAPES) + 1 + 2 * (len(DIRECTIONS) + 1),
        camera_outputs=len(CAMERA_MOVES) + 1,
    )
    text_result = fit(
        text,
        FunctionObjective(lambda m, i: text_loss(m, i, seed=seed)),
        text_settings,
        folder / "text",
        kernels=attention_kernel,
        on_progress=on_progress,
    )
    image = Reader(build_image_encoder(), actor_outputs=3 + 2, camera_outputs=1)
    canvases = Canvases(600, photos=TRAINING_PHOTOS, rng=np.random.default_rng((seed, 3)))
    image_result = fit(
        image,
        FunctionObjective(lambda m, i: image_loss(m, i, seed=seed, canvases=canvases)),
        image_settings,
        folder / "image",
        kernels=attention_kernel,
        on_progress=on_progress,
    )
    weights = {f"text_encoder.{k}": v for k, v in text.tower.state_dict().items()}
    weights |= {f"image_encoder.{k}": v for k, v in image.tower.state_dict().items()}
    return weights, text_result, image_result
