"""At which noise level the data decides motion degree and motion direction.

Two clips that differ in one thing only have latents a distance |delta| apart. Seen through noise,
latents = signal * clean + noise * normal, the best detector tells them apart with

    d' = |delta| * signal / noise,     so d' = 1 at the noise level |delta| / (1 + |delta|).

No model takes part. What is decided at higher noise must be got right by the early expert.
Source: matched filter, e.g. Green and Swets 1966.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch

from motionmerge.evaluation.pocket.prompts import scenes
from motionmerge.models.pocket.autoencoder import PocketAutoencoder
from motionmerge.models.pocket.language import OPPOSITE, Actor, Program
from motionmerge.models.pocket.world import Canvases, Scene, render

SLOW, FAST = 3.0, 11.0  # pixels


@dataclass(frozen=True)
class Alternative:
    """A question that noise hides.

    Args:
        name: The question.
        distances: |delta| of the latents of each pair of clips, `[pairs]`.
    """

    name: str
    distances: npt.NDArray[np.float64]

    def level(self, separation: float) -> float:
        """Return the noise level at which the median pair is told apart with this d'."""
        ratio = float(np.median(self.distances)) / separation
        return ratio / (1 + ratio)

    def separation(self, levels: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        """Compute d' of the median pair at noise levels inside (0, 1)."""
        return float(np.median(self.distances)) * (1 - levels) / levels


def decided(
    autoencoder: PocketAutoencoder, *, num: int = 60, split: str = "validation", seed: int = 0
) -> list[Alternative]:
    """Measure how far apart the alternatives are, in the latents that the model denoises.

    Motion degree: the camera goes 3 or 11 pixels. Camera direction: it goes 7 pixels one way or the
    other. Object direction: the first move goes one way or the other under a resting camera.
    """
    chosen, canvases = scenes(split, num=num, seed=seed)
    panned = [s for s in chosen if s.program.camera not in ("rests", "zooms in", "zooms out")]
    still = [_with_camera(scene, "rests", 0.0) for scene in chosen]
    cases = {
        f"motion degree: camera {SLOW:g} or {FAST:g} px": (
            [replace(scene, amplitude=SLOW) for scene in panned],
            [replace(scene, amplitude=FAST) for scene in panned],
        ),
        "camera direction: 7 px there or back": (
            [replace(scene, amplitude=7.0) for scene in panned],
            [_with_camera(scene, _OPPOSITE_CAMERA[scene.program.camera], 7.0) for scene in panned],
        ),
        "object direction: there or back": (still, [_with_opposite_moves(s) for s in still]),
    }
    return [
        Alternative(name, _distances(autoencoder, first, second, canvases))
        for name, (first, second) in cases.items()
    ]


_OPPOSITE_CAMERA = {
    "pans left": "pans right",
    "pans right": "pans left",
    "tilts up": "tilts down",
    "tilts down": "tilts up",
}


def _with_camera(scene: Scene, camera: str, amplitude: float) -> Scene:
    return replace(scene, program=replace(scene.program, camera=camera), amplitude=amplitude)


def _with_opposite_moves(scene: Scene) -> Scene:
    actors = tuple(
        Actor(actor.color, actor.shape, tuple(OPPOSITE[move] for move in actor.moves))
        for actor in scene.program.actors
    )
    return replace(scene, program=Program(actors, scene.program.camera))


@torch.no_grad()
def _distances(
    autoencoder: PocketAutoencoder,
    first: Sequence[Scene],
    second: Sequence[Scene],
    canvases: Canvases,
) -> npt.NDArray[np.float64]:
    times = autoencoder.keyframe_times().numpy().astype(np.float64)
    one, other = (
        autoencoder.encode(render(clips, canvases, times).flow) for clips in (first, second)
    )
    return (one - other).flatten(1).norm(dim=1).double().numpy()
