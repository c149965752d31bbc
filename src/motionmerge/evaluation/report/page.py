"""Write a report: one HTML file that needs no other, and its table as CSV, JSON and LaTeX."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from motionmerge.errors import ConfigError
from motionmerge.evaluation.flow import shared_scale
from motionmerge.evaluation.html import page_text
from motionmerge.evaluation.metrics import HEADLINES, METRICS
from motionmerge.evaluation.motion import REFERENCE_WIDTH
from motionmerge.evaluation.report.embedding import (
    EmbeddedVideo,
    embed_video,
    legend_uri,
    photo_uri,
    strip_uri,
)
from motionmerge.evaluation.report.radar import vbench_radar
from motionmerge.evaluation.report.scenes import SharedScene, is_frozen, order_scenes
from motionmerge.evaluation.report.sets import Figure, ReportSet, check_sets
from motionmerge.evaluation.report.table import (
    Table,
    compare_sets,
    to_csv,
    to_json,
    to_latex,
)
from motionmerge.evaluation.runs import Measured
from motionmerge.evaluation.statistics import LEVEL
from motionmerge.evaluation.vbench.total import DIMENSIONS, RANGES, Totals, totals
from motionmerge.io.atomic import write_whole

DEFAULT_MEGABYTES = 40.0

_NUM_COLORS = 8  # in the style sheet
_MOST_LISTED = 500  # scenes without videos
_MOST_SIZES = 4
_MOST_TOO_LARGE = 5  # scenes that are encoded in vain
_OF_A_CLIP = ("motion_degree", "object_motion", "first_frame_psnr", "warp_error")


@dataclass(frozen=True, kw_only=True)
class ShownVideo:
    """A video of a scene as the page shows it.

    Args:
        measured: None where the set has no such video.
        strip: Its flow pictures.
    """

    name: str
    color: str
    measured: Measured | None
    embedded: EmbeddedVideo | None
    strip: str | None

    @property
    def is_frozen(self) -> bool:
        """Whether the page warns that nothing moves."""
        return self.measured is not None and is_frozen(self.measured)

    @property
    def numbers(self) -> list[tuple[str, str]]:
        """Name and text of what was measured on it."""
        if self.measured is None or self.measured.failure is not None:
            return []
        found = [("camera", _words(str(self.measured.values.get("camera_label"))))]
        for name in _OF_A_CLIP:
            value = self.measured.number(name)
            if value is not None:
                text = f"{value:.{HEADLINES[name]}f} {METRICS[name].unit}".rstrip()
                found.append((_words(name), text))
        return found


def _words(name: str) -> str:
    return name.replace("_", " ")


@dataclass(frozen=True)
class ShownScene:
    """A scene with its photo and videos, encoded."""

    scene: SharedScene
    photo: str | None
    videos: Sequence[ShownVideo]


@dataclass(frozen=True, kw_only=True)
class WrittenReport:
    """What `write_report` wrote.

    Args:
        page: The HTML file.
        tables: CSV, JSON and LaTeX beside it.
        num_shown, num_left_out: Scenes with their videos, and without for want of space.
    """

    page: Path
    tables: Sequence[Path]
    num_shown: int
    num_left_out: int


def write_report(
    sets: Sequence[ReportSet],
    *,
    to: Path,
    title: str,
    figures: Sequence[Figure] = (),
    baseline: str | None = None,
    max_megabytes: float = DEFAULT_MEGABYTES,
) -> WrittenReport:
    """Write the page, and its table as `.csv`, `.json` and `.tex` under the same name.

    Args:
        sets: What is compared. Videos of one prompt, photo and seed are paired.
        to: The HTML file.
        title: Of the page.
        figures: Charts that the page shows too.
        baseline: Name of the set that the others are compared to; by default the first.
        max_megabytes: About how large the page may get. Scenes beyond it are listed without videos.

    Raises:
        ConfigError: There is no set, two have one name, none is the baseline, or `to` is no page.
        DataError: A file cannot be written.
    """
    if to.suffix.lower() not in (".html", ".htm"):
        raise ConfigError(f"`{to.name}` is no page.", fix="End the name with .html.")
    if not max_megabytes >= 0:
        raise ConfigError(f"`max_megabytes` is {max_megabytes}.", fix="Give 0 or more.")
    baseline = check_sets(sets, baseline)
    colors = {one.name: f"var(--set-{place % _NUM_COLORS})" for place, one in enumerate(sets)}
    table = compare_sets(sets, baseline=baseline)
    scenes = order_scenes(sets)
    shown, scale = _with_videos(scenes, colors, most_bytes=int(max_megabytes * 1e6))
    shown_keys = {one.scene.key for one in shown}
    radar = vbench_radar(sets, colors)
    text = _render(
        title=title,
        sets=sets,
        colors=colors,
        table=table,
        shown=shown,
        left_out=[scene for scene in scenes if scene.key not in shown_keys],
        most_listed=_MOST_LISTED,
        flow_scale=scale,
        legend=legend_uri(),
        figures=[*([radar] if radar else []), *figures],
        radar=radar,
        vbench=_vbench_lines(sets),
        num_alone=_num_alone(sets, scenes),
        sizes={one.name: _sizes(one) for one in sets},
    )
    tables = {
        to.with_suffix(".csv"): to_csv(table),
        to.with_suffix(".json"): to_json(table, sets),
        to.with_suffix(".tex"): to_latex(table),
    }
    for path, content in {**tables, to: text}.items():
        write_whole(path, content)
    return WrittenReport(
        page=to,
        tables=tuple(tables),
        num_shown=len(shown),
        num_left_out=len(scenes) - len(shown),
    )


def _with_videos(
    scenes: Sequence[SharedScene], colors: Mapping[str, str], *, most_bytes: int
) -> tuple[list[ShownScene], float]:
    """Encode the first scenes that fit, with all flow on one scale (pixels a second)."""
    chosen: list[tuple[SharedScene, str | None, dict[str, EmbeddedVideo]]] = []
    used = num_too_large = 0
    for scene in scenes:
        videos = {name: embed_video(one.source.path) for name, one in scene.videos.items()}
        photos = (photo_uri(one.source.photo) for one in scene.videos.values())
        photo = next((uri for uri in photos if uri is not None), None)
        size = sum(one.num_bytes for one in videos.values()) + len(photo or "")
        if used + size <= most_bytes:
            used += size
            chosen.append((scene, photo, videos))
        else:
            num_too_large += 1  # the next may be smaller, but not for ever
            if num_too_large == _MOST_TOO_LARGE:
                break
    flows = [flow for _, _, videos in chosen for one in videos.values() for flow in one.flows]
    scale = shared_scale(flows) if flows else 1.0
    shown = []
    for scene, photo, videos in chosen:
        those = []
        for name, color in colors.items():
            embedded = videos.get(name)
            has_flow = embedded is not None and embedded.flows
            strip = strip_uri(embedded.flows, scale=scale) if embedded and has_flow else None
            those.append(
                ShownVideo(
                    name=name,
                    color=color,
                    measured=scene.videos.get(name),
                    embedded=embedded,
                    strip=strip,
                )
            )
        shown.append(ShownScene(scene, photo, those))
    return shown, scale


def _num_alone(sets: Sequence[ReportSet], scenes: Sequence[SharedScene]) -> int:
    """Count the videos of which no other set has the prompt, photo and seed."""
    shared = {scene.key for scene in scenes}
    return sum(
        len(videos) for one in sets for key, videos in one.by_key.items() if key not in shared
    )


def _sizes(one: ReportSet) -> str:
    """Return how large and long the files of a set are, the most common first."""
    counts = Counter(
        f"{values['width']} x {values['height']}, {values['num_frames']} frames"
        + (f" at {rate:.4g} a second" if (rate := measured.number("frame_rate")) else "")
        for measured in one.measured
        if (values := measured.values).keys() >= {"width", "height", "num_frames"}
    )
    if len(counts) == 1:
        return next(iter(counts))
    listed = [f"{num} of {text}" for text, num in counts.most_common(_MOST_SIZES)]
    left = len(counts) - len(listed)
    return "; ".join([*listed, *([f"{left} other kinds"] if left else [])])


@dataclass(frozen=True)
class VBenchLine:
    """VBench's scores of one set, in the order of `DIMENSIONS`; totals where all are there."""

    name: str
    scores: Sequence[float | None]
    totals: Totals | None


def _vbench_lines(sets: Sequence[ReportSet]) -> list[VBenchLine]:
    return [
        VBenchLine(
            one.name,
            [one.vbench.get(name) for name in DIMENSIONS],
            totals(one.vbench) if set(RANGES) <= set(one.vbench) else None,
        )
        for one in sets
        if one.vbench
    ]


def _render(*, title: str, table: Table, **content: object) -> str:
    return page_text(
        "report.html.j2",
        title=title,
        table=table,
        has_too_few=any(line.has_too_few for line in table.lines),
        metrics=METRICS,
        digits=HEADLINES,
        dimensions=DIMENSIONS,
        level=LEVEL,
        reference_width=REFERENCE_WIDTH,
        **content,
    )
