"""The demo's page: videos side by side and in step, flow pictures, numbers, and how each was made.

One HTML file with its style and script inside; videos and pictures are files beside it.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from motionmerge.evaluation.html import filled
from motionmerge.evaluation.statistics import Estimate
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
class PageClip:
    """One video with what was measured on it.

    Args:
        video, flow: Paths relative to the page.
        degree: Motion degree in pixels of a 64-pixel frame.
        camera: Kind of camera move seen.
        disobedience: What objects and camera do against the prompt; empty where they obey.
        damage: What is no longer whole; empty where all is.
    """

    title: str
    video: str
    flow: str
    degree: float
    camera: str
    disobedience: tuple[str, ...] = ()
    damage: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Shot:
    """A prompt and its photo, with a clip per method.

    Args:
        look_for: What the prompt wants to be seen.
        tells_all: Whether it names the camera and an object.
    """

    prompt: str
    look_for: str
    tells_all: bool
    photo: str
    picture: str
    clips: tuple[PageClip, ...]


@dataclass(frozen=True, kw_only=True)
class Numbers:
    """One line of the page's table, with the same rules as the badges; shares in percent.

    Args:
        title: Of the method.
        degree: Motion degree in pixels.
        obeys: Share of clips in which objects and camera do all that the prompt says.
        whole: Share of clips that are still whole.
        objects_right, camera_right: Shares of clips in which the one or the other does; the camera
            where the prompt names it, None where none does.
    """

    title: str
    degree: Estimate
    obeys: Estimate
    whole: Estimate
    objects_right: Estimate
    camera_right: Estimate | None

    def cells(self) -> list[tuple[str, str]]:
        """Return heading and text of every column behind the title."""
        camera = "–" if self.camera_right is None else f"{self.camera_right.value:.0f}"
        return [
            ("motion degree (px)", self.degree.text(1)),
            ("obeys (%)", self.obeys.text(0)),
            ("whole (%)", self.whole.text(0)),
            ("objects right (%)", f"{self.objects_right.value:.0f}"),
            ("camera right (%)", camera),
        ]


@dataclass(frozen=True, kw_only=True)
class Page:
    """All that the page shows.

    Args:
        result: What the numbers of the run come to, in a sentence.
        rows: The table's numbers, one row per method.
        num_table_prompts: How many prompts each row rests on.
        flow_scale: Length in pixels of a fully colored flow.
        knob_svg: The motion-knob curve, trusted markup.
    """

    methods: tuple[Method, ...]
    shots: tuple[Shot, ...]
    result: str
    rows: tuple[Numbers, ...]
    num_table_prompts: int
    flow_scale: float
    knob_svg: str
    seed: int


def write_demo_page(page: Page, path: Path) -> Path:
    """Write the page; every text in it is escaped."""
    template = Path(__file__).parent / "templates" / "report.html.j2"
    with atomic_path(path) as temporary:
        temporary.write_text(filled(template, page=page, version=__version__), encoding="utf-8")
    return path
