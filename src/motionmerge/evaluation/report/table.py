"""The report's table: every metric of every set with its interval, and paired differences.

Differences are those of videos with the same prompt, photo and seed; prompts with their photo are
the clusters. Their p-values are corrected for the number of metrics (Holm), set by set.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from motionmerge.evaluation.metrics import HEADLINES, METRICS
from motionmerge.evaluation.motion import REFERENCE_WIDTH
from motionmerge.evaluation.report.sets import Key, ReportSet
from motionmerge.evaluation.statistics import (
    LEVEL,
    Estimate,
    bootstrap_mean,
    fewest_to_be_sure,
    holm,
    sign_flip_p_value,
)
from motionmerge.evaluation.summary import Summary, summarise
from motionmerge.evaluation.tables import csv_text


@dataclass(frozen=True)
class PairedDifference:
    """How a set differs from the baseline in one metric.

    Args:
        mean: Of set - baseline, with its interval over prompts.
        num: Pairs of videos.
        p_value: Two-sided, by random signs, corrected by Holm over the set's metrics.
    """

    mean: Estimate
    num: int
    p_value: float

    @property
    def is_clear(self) -> bool:
        """Whether chance alone hardly makes it."""
        return self.p_value < LEVEL


@dataclass(frozen=True)
class Cell:
    """One metric of one set.

    Args:
        mean: With its interval.
        num: Videos that have the metric.
        difference: From the baseline; None for the baseline, or where no video can be paired.
    """

    mean: Estimate
    num: int
    difference: PairedDifference | None = None


@dataclass(frozen=True)
class TableLine:
    """One set: its counts, and its cells by metric."""

    name: str
    summary: Summary
    cells: Mapping[str, Cell]

    @property
    def has_too_few(self) -> bool:
        """Whether so few prompts are paired that no corrected p-value can get below `LEVEL`."""
        found = [cell.difference for cell in self.cells.values() if cell.difference is not None]
        most = max((one.mean.num for one in found), default=0)
        return bool(found) and most < fewest_to_be_sure(len(found))


@dataclass(frozen=True)
class Table:
    """All sets; `metrics` are those of `HEADLINES` that a set has."""

    baseline: str
    metrics: Sequence[str]
    lines: Sequence[TableLine]


def compare_sets(sets: Sequence[ReportSet], *, baseline: str) -> Table:
    """Summarise every set, and compare each to the baseline."""
    first = next(one for one in sets if one.name == baseline)
    lines = []
    for one in sets:
        summary = summarise(one.measured)
        names = [name for name in HEADLINES if name in summary.means]
        differences = {} if one is first else paired_differences(one, first, metrics=names)
        cells = {
            name: Cell(summary.means[name], summary.nums[name], differences.get(name))
            for name in names
        }
        lines.append(TableLine(one.name, summary, cells))
    metrics = [name for name in HEADLINES if any(name in line.cells for line in lines)]
    return Table(baseline, metrics, lines)


def paired_differences(
    one: ReportSet, baseline: ReportSet, *, metrics: Sequence[str]
) -> dict[str, PairedDifference]:
    """Compare a set to the baseline, over the videos that both have."""
    means, nums, p_values = {}, {}, {}
    for metric in metrics:
        ours, theirs = _values(one, metric), _values(baseline, metric)
        keys = [key for key in ours if key in theirs]
        if keys:
            differences = [ours[key] - theirs[key] for key in keys]
            clusters = [_cluster(key) for key in keys]
            means[metric] = bootstrap_mean(differences, clusters=clusters)
            nums[metric] = len(keys)
            p_values[metric] = sign_flip_p_value(differences, clusters=clusters)
    corrected = holm(p_values)
    return {name: PairedDifference(means[name], nums[name], corrected[name]) for name in means}


def _values(one: ReportSet, metric: str) -> dict[Key, float]:
    """Return a metric by key; several videos with one key give their mean."""
    found = {}
    for key, videos in one.by_key.items():
        numbers = [number for video in videos if (number := video.number(metric)) is not None]
        if numbers:
            found[key] = math.fsum(numbers) / len(numbers)
    return found


def _cluster(key: Key) -> tuple[str, ...]:
    """Return the prompt and photo of a video; where neither is known it stands for itself."""
    return key if not key[0] and not key[1] else key[:2]


# The same table for programs and papers


def table_rows(table: Table) -> list[dict[str, str | int | float | None]]:
    """Return one flat row for each set and metric; what there is not is None."""
    rows: list[dict[str, str | int | float | None]] = []
    for line in table.lines:
        for metric, cell in line.cells.items():
            change = cell.difference
            mean = cell.mean.to_dict()
            difference = {} if change is None else change.mean.to_dict()
            rows.append(
                {
                    "set": line.name,
                    "metric": metric,
                    "unit": METRICS[metric].unit,
                    "mean": mean["value"],
                    "low": mean["low"],
                    "high": mean["high"],
                    "num_videos": cell.num,
                    "num_prompts": cell.mean.num,
                    "difference": difference.get("value"),
                    "difference_low": difference.get("low"),
                    "difference_high": difference.get("high"),
                    "num_pairs": None if change is None else change.num,
                    "p_value_holm": None if change is None else change.p_value,
                }
            )
    return rows


def to_csv(table: Table) -> str:
    """Write one row for each set and metric."""
    return csv_text(table_rows(table)) or "set\n"


def to_json(table: Table, sets: Sequence[ReportSet]) -> str:
    """Write the table, the counts of every set and what made it."""
    content = {
        "baseline": table.baseline,
        "reference_width": REFERENCE_WIDTH,
        "sets": [
            {
                "name": one.name,
                "about": dict(one.about),
                "vbench": dict(one.vbench),
                **line.summary.to_dict(),
            }
            for one, line in zip(sets, table.lines, strict=True)
        ],
        "table": table_rows(table),
    }
    return json.dumps(content, indent=2, allow_nan=False) + "\n"


_TEX = {
    **{letter: f"\\{letter}" for letter in "&%$#_{}"},
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
}


def to_latex(table: Table) -> str:
    """Write a table for the package booktabs: a column for each set, clear differences in bold."""
    heads = " & ".join(_tex(line.name) for line in table.lines)
    lines = [
        r"% \usepackage{booktabs}",
        r"\begin{tabular}{l" + "r" * len(table.lines) + "}",
        r"\toprule",
        rf" & {heads} \\",
        r"\midrule",
    ]
    for name in table.metrics:
        cells = [_tex_cell(line.cells.get(name), HEADLINES[name]) for line in table.lines]
        lines.append(rf"{_tex(_with_unit(name))} & {' & '.join(cells)} \\")
    note = (
        f"Means with 95 % intervals over prompts; lengths in a frame {REFERENCE_WIDTH} px wide. "
        f"Bold: differs from {table.baseline} (paired, Holm, p < {LEVEL})."
    )
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}", f"% {_one_line(note)}", ""])


def _with_unit(metric: str) -> str:
    unit = METRICS[metric].unit
    return f"{metric} ({unit})" if unit else metric


def _tex_cell(cell: Cell | None, digits: int) -> str:
    if cell is None:
        return "--"
    value = f"{cell.mean.value:.{digits}f}"
    if cell.difference is not None and cell.difference.is_clear:
        value = rf"\textbf{{{value}}}"
    if math.isnan(cell.mean.low):
        return value
    return rf"{value} {{\scriptsize [{cell.mean.low:.{digits}f}, {cell.mean.high:.{digits}f}]}}"


def _tex(text: str) -> str:
    return "".join(_TEX.get(letter, letter) for letter in _one_line(text))


def _one_line(text: str) -> str:
    return " ".join(text.split())
