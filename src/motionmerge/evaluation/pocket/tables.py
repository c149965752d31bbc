"""The numbers of an evaluation as tables, and their place in the project's Markdown files."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from motionmerge.errors import DataError
from motionmerge.evaluation.pocket.claims import Claim, full_methods, judge
from motionmerge.evaluation.pocket.prompts import DIFFICULTIES
from motionmerge.evaluation.pocket.runs import ConditionResults, Protocol
from motionmerge.evaluation.statistics import Estimate, bootstrap_mean, wilson_interval
from motionmerge.io.atomic import atomic_path, prepare_folder

if TYPE_CHECKING:
    from motionmerge.evaluation.pocket.decided import Alternative

BEGIN, END = "<!-- numbers:begin -->", "<!-- numbers:end -->"
HEADINGS = (
    "condition",
    "motion degree (px)",
    "obedience (%)",
    *(f"{name} (%)" for name in DIFFICULTIES),
    "halves right (%)",
    "camera right (%)",
    "intact (%)",
    "first frame (dB)",
)
README_HEADINGS = (*HEADINGS[:3], "camera right (%)", "intact (%)")


@dataclass(frozen=True, kw_only=True)
class ConditionRow:
    """One condition's numbers with 95 % intervals; shares in percent.

    Args:
        degree: Motion degree in pixels.
        obedience: Share of clips in which every object does all it was told.
        by_difficulty: The same per kind of prompt, without intervals.
        halves_right: Share of halves of moves that go where the prompt says, averaged over clips.
        camera_right: Share of clips with a captioned camera that moves so; None without any.
        intact: Share of clips with all objects still there, once each.
        first_frame_db: PSNR of the first frame.
    """

    name: str
    degree: Estimate
    obedience: Estimate
    by_difficulty: tuple[float, ...]
    halves_right: Estimate
    camera_right: Estimate | None
    intact: Estimate
    first_frame_db: Estimate

    def cells(self) -> list[str]:
        """Return the row as texts, in the order of `HEADINGS`."""
        camera = "–" if self.camera_right is None else f"{self.camera_right.value:.0f}"
        return [
            self.name,
            self.degree.text(2),
            self.obedience.text(1),
            *(f"{share:.0f}" for share in self.by_difficulty),
            f"{self.halves_right.value:.0f}",
            camera,
            f"{self.intact.value:.0f}",
            f"{self.first_frame_db.value:.1f}",
        ]


def table_row(results: ConditionResults) -> ConditionRow:
    """Compute the row of one condition."""
    told = [clip.camera_right for clip in results.clips if clip.camera_right is not None]
    return ConditionRow(
        name=results.condition.name,
        degree=bootstrap_mean(results.column("degree")[results.moving]),
        obedience=share_of([clip.obeyed for clip in results.clips]),
        by_difficulty=tuple(
            share_of([clip.obeyed for clip in results.clips if clip.difficulty == name]).value
            for name in DIFFICULTIES
            if any(clip.difficulty == name for clip in results.clips)
        ),
        halves_right=bootstrap_mean(100 * results.column("direction_right")),
        camera_right=share_of(told) if told else None,
        intact=share_of([clip.intact for clip in results.clips]),
        first_frame_db=bootstrap_mean(results.column("first_frame_db")),
    )


def share_of(values: Sequence[bool]) -> Estimate:
    """Return the share of values that hold, in percent, with its interval."""
    return wilson_interval(sum(values), len(values)).scaled(100)


def markdown_table(rows: Iterable[ConditionRow], *, headings: Sequence[str] = HEADINGS) -> str:
    """Return a Markdown table of conditions, with some of the columns."""
    columns = [HEADINGS.index(heading) for heading in headings]
    lines = [" | ".join(headings), " | ".join("---" for _ in headings)]
    lines += [" | ".join(row.cells()[column] for column in columns) for row in rows]
    return "".join(f"| {line} |\n" for line in lines)


def markdown_claims(claims: Iterable[Claim]) -> str:
    """Return a Markdown list of claims with verdicts and evidence."""
    lines = []
    for claim in claims:
        lines.append(f"* **({claim.number}) {claim.text}: {claim.verdict}.**")
        lines += [
            f"  {line}{';' if line != claim.evidence[-1] else '.'}" for line in claim.evidence
        ]
    return "\n".join(lines) + "\n"


def write_docs(
    results: Mapping[str, ConditionResults],
    *,
    protocol: Protocol,
    alternatives: Sequence[Alternative],
    root: Path,
) -> list[Path]:
    """Write pictures, `docs/pocket.md`'s numbers and the README's numbers.

    Args:
        results: Of all conditions.
        protocol: What they have in common.
        alternatives: What `decided` found.
        root: The repository's folder.

    Returns:
        The files written.

    Raises:
        DataError: There is no README.md, or it has no place for the numbers.
    """
    from motionmerge.evaluation.figures import to_png
    from motionmerge.evaluation.pocket.charts import decided_chart, front_chart, knob_chart

    images = root / "docs" / "images"
    charts = {
        "pocket-front": front_chart(results),
        "pocket-knob": knob_chart(results),
        "pocket-decided": decided_chart(alternatives),
    }
    written = []
    for name, figure in charts.items():
        path = images / f"{name}.png"
        with atomic_path(path) as temporary:
            temporary.write_bytes(to_png(figure))
        written.append(path)
    claims = judge(results)
    guide = root / "docs" / "pocket.md"
    if not guide.exists():
        guide.write_text(f"# The pocket model, measured\n\n{BEGIN}\n{END}\n", encoding="utf-8")
    replace_block(guide, _guide_block(results, claims, protocol, alternatives))
    replace_block(root / "README.md", _readme_block(results, claims, protocol))
    return [*written, guide, root / "README.md"]


def check_docs(root: Path) -> None:
    """Refuse a folder in which `write_docs` could not write, before anything is measured.

    Raises:
        DataError: There is no README.md, or a file has no place for the numbers.
        ConfigError: The folder cannot be written to.
    """
    guide, readme = root / "docs" / "pocket.md", root / "README.md"
    for path in (readme, *([guide] if guide.exists() else [])):
        _around_block(path)
    prepare_folder(root / "docs" / "images")


def replace_block(path: Path, text: str) -> None:
    """Write `text` between the markers of a Markdown file.

    Raises:
        DataError: The file or one of the markers is missing.
    """
    before, after = _around_block(path)
    with atomic_path(path) as temporary:
        temporary.write_text(f"{before}{BEGIN}\n{text.strip()}\n{END}{after}", encoding="utf-8")


def _around_block(path: Path) -> tuple[str, str]:
    """Read what is before and behind the markers of a Markdown file."""
    content = path.read_text(encoding="utf-8") if path.is_file() else ""
    before, begin, rest = content.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise DataError(
            f"{path} has no place for the numbers.", fix=f"Add the lines `{BEGIN}` and `{END}`."
        )
    return before, after


def protocol_line(protocol: Protocol) -> str:
    """Return in a sentence what all numbers of an evaluation rest on."""
    return (
        f"{protocol.num} prompts of the {protocol.split} split per condition, "
        f"seed {protocol.seed}, {protocol.num_inference_steps} steps, "
        "the same prompts and noise for every condition; in brackets 95 % intervals over prompts."
    )


def _guide_block(
    results: Mapping[str, ConditionResults],
    claims: Sequence[Claim],
    protocol: Protocol,
    alternatives: Sequence[Alternative],
) -> str:
    levels = "\n".join(
        f"| {one.name} | {one.level(1):.2f} | {one.level(3):.2f} |" for one in alternatives
    )
    return f"""\
Written by `motionmerge evaluate pocket --write-docs`. {protocol_line(protocol)}

{markdown_table(table_row(one) for one in results.values())}
## The claims

{markdown_claims(claims)}
## Obedience against motion degree

![Obedience against motion degree of every condition](images/pocket-front.png)

## The motion knob

![Motion degree and obedience along the knob](images/pocket-knob.png)

## Where in noise level degree and direction are decided

![How well alternatives can be told apart at each noise level](images/pocket-decided.png)

A matched filter on the latents of pairs of clips that differ in one thing; no model takes part.

| alternatives | noise level at d′ = 1 | at d′ = 3 |
| --- | --- | --- |
{levels}
"""


def _readme_block(
    results: Mapping[str, ConditionResults], claims: Sequence[Claim], protocol: Protocol
) -> str:
    full = full_methods()[-1]
    reverse = full.rpartition("-")
    names = ("base", "naive", "tuned", "knob+0.5", full, f"{reverse[0]}-reversed-{reverse[2]}")
    table = markdown_table(
        (table_row(results[name]) for name in names if name in results), headings=README_HEADINGS
    )
    failed = [f"({one.number}) {one.text}." for one in claims if one.verdict != "holds"]
    verdict = f"{len(claims) - len(failed)} of {len(claims)} claims hold."
    return f"""\
{protocol_line(protocol)} All of it: [docs/pocket.md](docs/pocket.md).

{table}
{verdict}{" **Does not hold:** " if failed else ""}{" ".join(failed)}
"""
