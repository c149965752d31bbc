"""The page of the demo and of the pocket model's evaluation: videos, numbers, verdicts, recipes.

It is made of the same parts as the page of `report`, and needs no other file.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from motionmerge.evaluation.flow import shared_scale
from motionmerge.evaluation.html import page_text
from motionmerge.evaluation.motion import REFERENCE_WIDTH
from motionmerge.evaluation.pocket.charts import front_figure, knob_figure
from motionmerge.evaluation.pocket.claims import Claim
from motionmerge.evaluation.pocket.conditions import KNOB, Condition
from motionmerge.evaluation.pocket.runs import ConditionResults, Protocol
from motionmerge.evaluation.pocket.tables import HEADINGS, protocol_line, table_row
from motionmerge.evaluation.report.embedding import EmbeddedVideo, legend_uri, strip_uri
from motionmerge.evaluation.report.sets import Figure
from motionmerge.io.atomic import write_whole

PAGE_FILE = "index.html"


@dataclass(frozen=True, kw_only=True)
class Method:
    """A set of weights: its name, a note, and the recipe behind it."""

    title: str
    note: str
    condition: str
    recipe: str
    schedule: str

    @classmethod
    def of(cls, condition: Condition, *, title: str, note: str = "") -> Method:
        """Describe a condition."""
        recipe = condition.recipe()
        return cls(
            title=title,
            note=note,
            condition=condition.name,
            recipe=recipe.print(),
            schedule=recipe.schedule.draw() if recipe.schedule else "",
        )


@dataclass(frozen=True, kw_only=True)
class PageClip:
    """One video with what was measured on it.

    Args:
        degree: Motion degree in pixels of a 64-pixel frame.
        camera: Kind of camera move seen.
        disobedience: What objects and camera do against the prompt; empty where they obey.
        damage: What is no longer whole; empty where all is.
    """

    title: str
    video: EmbeddedVideo
    degree: float
    camera: str
    disobedience: tuple[str, ...] = ()
    damage: tuple[str, ...] = ()

    def strip(self, scale: float) -> str | None:
        """Return its flow pictures; None where there is no flow."""
        return strip_uri(self.video.flows, scale=scale) if self.video.flows else None


@dataclass(frozen=True, kw_only=True)
class Shot:
    """A prompt and its photo, with a clip per method.

    Args:
        look_for: What the prompt wants to be seen.
        tells_all: Whether it names the camera and an object.
        photo: The picture, as an address that holds it.
    """

    prompt: str
    look_for: str
    tells_all: bool
    photo: str
    clips: tuple[PageClip, ...]


@dataclass(frozen=True)
class PageRow:
    """One line of the page's table: the texts of a set of weights by their headings."""

    title: str
    cells: Mapping[str, str]

    def sort_value(self, heading: str) -> str:
        """Return the number that a text begins with; "" if there is none."""
        first = self.cells[heading].split()[0]
        return first if first[-1].isdigit() else ""


@dataclass(frozen=True, kw_only=True)
class PocketPage:
    """All that the page shows.

    Args:
        rows: The table's numbers, one row per set of weights.
        about: What the numbers rest on, in sentences.
        result: What the numbers of the run come to, in a sentence.
    """

    title: str
    methods: tuple[Method, ...]
    rows: tuple[PageRow, ...]
    about: str
    seed: int
    figures: tuple[Figure, ...] = ()
    shots: tuple[Shot, ...] = ()
    claims: tuple[Claim, ...] = ()
    result: str = ""


def write_evaluation_page(
    results: Mapping[str, ConditionResults],
    claims: Sequence[Claim],
    *,
    protocol: Protocol,
    path: Path,
) -> Path:
    """Write the page of an evaluation: its table, the claims, and the charts that it has."""
    conditions = [one.condition for one in results.values()]
    figures = [front_figure(results)] if len(conditions) > 1 else []
    if sum(one.family == KNOB for one in conditions) > 1:
        figures.append(knob_figure(results))
    page = PocketPage(
        title="The pocket model, measured",
        methods=tuple(Method.of(one, title=one.name) for one in conditions),
        rows=tuple(
            PageRow(one, dict(zip(HEADINGS[1:], table_row(found).cells()[1:], strict=True)))
            for one, found in results.items()
        ),
        about=protocol_line(protocol),
        figures=tuple(figures),
        claims=tuple(claims),
        seed=protocol.seed,
    )
    return write_pocket_page(page, path)


def write_pocket_page(page: PocketPage, path: Path) -> Path:
    """Write the page, with all flow on one scale; every text in it is escaped."""
    flows = [flow for shot in page.shots for clip in shot.clips for flow in clip.video.flows]
    text = page_text(
        "pocket.html.j2",
        title=page.title,
        page=page,
        flow_scale=shared_scale(flows) if flows else 1.0,
        legend=legend_uri(),
        reference_width=REFERENCE_WIDTH,
    )
    write_whole(path, text)
    return path
