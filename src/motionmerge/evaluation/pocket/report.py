"""The demo's page: videos side by side and in step, flow pictures, numbers, and how each was made.

One HTML file with its style and script inside; videos and pictures are files beside it.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from motionmerge.evaluation.pocket.tables import HEADINGS, Row
from motionmerge.io.atomic import atomic_path
from motionmerge.version import __version__


@dataclass(frozen=True, kw_only=True)
class Method:
    """One column of the page: a name, a note, and the recipe behind it."""

    title: str
    note: str
    condition: str
    recipe: str
    schedule: str


@dataclass(frozen=True, kw_only=True)
class Clip:
    """One video with what was measured on it.

    Args:
        video, flow: Paths relative to the page.
        degree: Motion degree in pixels of a 64-pixel frame.
        camera: Kind of camera move seen.
        obeyed: Whether the objects did as told; None without objects.
    """

    title: str
    video: str
    flow: str
    degree: float
    camera: str
    obeyed: bool | None


@dataclass(frozen=True)
class Shot:
    """A prompt and its photo, with a clip per method."""

    prompt: str
    photo: str
    picture: str
    clips: tuple[Clip, ...]


@dataclass(frozen=True, kw_only=True)
class Page:
    """All that the page shows.

    Args:
        rows: The table's numbers, one row per method.
        num_table_prompts: How many prompts each row rests on.
        flow_scale: Length in pixels of a fully colored flow.
        knob_svg: The motion-knob curve, trusted markup.
    """

    methods: tuple[Method, ...]
    shots: tuple[Shot, ...]
    rows: tuple[Row, ...]
    num_table_prompts: int
    flow_scale: float
    knob_svg: str
    seed: int


def write_report(page: Page, path: Path) -> Path:
    """Write the page; every text in it is escaped."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    template = environment.get_template("report.html.j2")
    with atomic_path(path) as temporary:
        temporary.write_text(
            template.render(page=page, headings=HEADINGS, version=__version__), encoding="utf-8"
        )
    return path
