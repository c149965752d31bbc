"""The little language of the pocket world: scene programs, their captions and the fixed vocabulary.

A `Program` says what happens in a clip: which objects move where, in one or two phases, and what
kind of camera move there is. Its caption never tells how far the camera goes: that is motion
degree.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

COLORS = ("red", "green", "blue", "yellow", "purple")
SHAPES = ("ball", "box")
DIRECTIONS = ("left", "right", "up", "down")
CAMERA_MOVES = (
    "rests",
    "pans left",
    "pans right",
    "tilts up",
    "tilts down",
    "zooms in",
    "zooms out",
)
OPPOSITE = {"left": "right", "right": "left", "up": "down", "down": "up"}
WORDS = (
    "<pad>",
    "<start>",
    "<end>",
    "the",
    "moves",
    "then",
    "and",
    "camera",
    "pans",
    "tilts",
    "zooms",
    "rests",
    "in",
    "out",
    *COLORS,
    *SHAPES,
    *DIRECTIONS,
)


@dataclass(frozen=True)
class Actor:
    """One object and its captioned move relative to the picture.

    Args:
        color, shape: What it looks like; a color names one actor at most.
        moves: One direction, or two of them, one after the other.
    """

    color: str
    shape: str
    moves: tuple[str, ...]

    @property
    def phases(self) -> tuple[str, str]:
        """Direction in the first and in the second half of the clip."""
        return self.moves[0], self.moves[-1]

    def caption(self) -> str:
        return f"the {self.color} {self.shape} moves {' then '.join(self.moves)}"


@dataclass(frozen=True)
class Program:
    """What happens in a clip.

    Args:
        actors: The moving objects, none to two.
        camera: One of `CAMERA_MOVES`.
        camera_is_captioned: Whether the caption names the camera move.
    """

    actors: tuple[Actor, ...]
    camera: str
    camera_is_captioned: bool = False

    def caption(self) -> str:
        """Return the true caption, in lower case without punctuation."""
        clauses = [actor.caption() for actor in self.actors]
        if self.camera_is_captioned:
            clauses.append(f"the camera {self.camera}")
        return " and ".join(clauses)

    @property
    def difficulty(self) -> str:
        """`plain` (one straight move), `sequence` (some move changes), `several` or `none`."""
        if not self.actors:
            return "none"
        if any(len(actor.moves) == 2 for actor in self.actors):
            return "sequence"
        return "several" if len(self.actors) > 1 else "plain"


def sample_moves(rng: np.random.Generator, *, sequence_share: float = 0.5) -> tuple[str, ...]:
    """Draw one direction, or with probability `sequence_share` two at a right angle."""
    first = str(rng.choice(DIRECTIONS))
    if rng.random() >= sequence_share:
        return (first,)
    turns = [d for d in DIRECTIONS if d not in (first, OPPOSITE[first])]
    return (first, str(rng.choice(turns)))


def sample_program(
    rng: np.random.Generator,
    *,
    actor_shares: tuple[float, ...] = (0.1, 0.6, 0.3),
    camera_caption_share: float = 0.5,
) -> Program:
    """Draw a program: actors by `actor_shares`, camera moves evenly (rest half as often)."""
    num_actors = int(rng.choice(len(actor_shares), p=actor_shares))
    colors = rng.permutation(COLORS)[:num_actors]
    actors = tuple(
        Actor(str(color), str(rng.choice(SHAPES)), sample_moves(rng)) for color in colors
    )
    weights = np.array([0.5] + [1.0] * (len(CAMERA_MOVES) - 1))
    camera = str(rng.choice(CAMERA_MOVES, p=weights / weights.sum()))
    return Program(actors, camera, bool(rng.random() < camera_caption_share))


def corrupt_program(rng: np.random.Generator, program: Program) -> Program:
    """Draw new moves for the same objects: the source of wrong captions.

    The camera is left alone: its caption is true whenever there is one.
    """
    actors = tuple(replace(actor, moves=sample_moves(rng)) for actor in program.actors)
    return replace(program, actors=actors)
