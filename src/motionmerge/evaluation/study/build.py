"""Build a study: one static folder for raters, and a file with the key that stays at home."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from motionmerge.errors import ConfigError, DataError
from motionmerge.evaluation.html import STYLE
from motionmerge.evaluation.sources import VideoSource
from motionmerge.evaluation.study.encoding import Shape, Shelf, check_card, common_size
from motionmerge.evaluation.study.manifest import (
    ANSWERS_FILE,
    FORMAT,
    QUESTIONS,
    SITE,
    STUDY_FILE,
    AttentionCheck,
    ComparedPair,
    ExclusionRule,
    Manifest,
    Study,
    Task,
)
from motionmerge.evaluation.study.pairs import PlannedPair, System, plan_pairs
from motionmerge.io.atomic import atomic_folder, check_new_folder
from motionmerge.io.paths import exists

PAGE_FILES = ("index.html", "study.js", "study.css")
MANIFEST_SCRIPT = "manifest.js"

_PAGE = Path(__file__).parent / "site"
_MOST_PROMPT = 2000  # characters
_ID_DIGITS = 20


@dataclass(frozen=True, kw_only=True)
class StudyPlan:
    """How a study is laid out.

    Args:
        title: Above the page.
        questions: Names out of `QUESTIONS`; by default all that prompts and photos allow.
        baseline: Compare all others with this system only.
        per_rater: Pairs that a rater judges, beside checks and repeats.
        num_checks: Attention checks of a rater.
        num_repeats: Pairs that a rater judges again with swapped sides.
        rule: Which raters will not count.
        seed: Of orders and sides.
    """

    title: str = "Which video is better?"
    questions: Sequence[str] | None = None
    baseline: str | None = None
    per_rater: int = 20
    num_checks: int = 2
    num_repeats: int = 2
    rule: ExclusionRule = field(default_factory=ExclusionRule)
    seed: int = 0

    def check(self) -> None:
        """Refuse numbers out of range.

        Raises:
            ConfigError: Names the number.
        """
        for name, low, high in (
            ("per_rater", 1, 1000),
            ("num_checks", 0, 100),
            ("num_repeats", 0, self.per_rater),
        ):
            value = getattr(self, name)
            if not low <= value <= high:
                raise ConfigError(
                    f"`{name}` is {value}.", fix=f"Give a number from {low} to {high}."
                )
        unknown = [name for name in self.questions or () if name not in QUESTIONS]
        if unknown or self.questions == []:
            raise ConfigError(
                f"There is no question `{unknown[0] if unknown else ''}`.",
                fix=f"Choose from {', '.join(QUESTIONS)}.",
            )


def build_study(
    systems: Sequence[System],
    *,
    to: Path,
    plan: StudyPlan,
    progress: Callable[[str, int], None] = lambda name, done: None,
) -> Study:
    """Write the study's folder: `site/` for raters, and `study.json` with the key.

    Raises:
        ConfigError: As `StudyPlan.check` and `plan_pairs`, or the folder holds answers, videos of
            these systems, or other things than an earlier study.
        DataError: Videos cannot be read or shown alike, two systems have the same ones, or a
            question needs what is not known.
    """
    plan.check()
    if exists(to / ANSWERS_FILE):
        raise ConfigError(
            f"{to} holds answers of raters.", fix="Choose another folder, or move them away."
        )
    sources = [source for one in systems for source in one.by_key.values()]
    check_new_folder(to, overwrite=True, marker=STUDY_FILE, keep=[one.path for one in sources])
    draw = random.Random(plan.seed)
    pairs = plan_pairs(systems, baseline=plan.baseline, draw=draw)
    by_name = {one.name: one for one in systems}
    questions = _questions(plan, [by_name[pair.first].by_key[pair.scene] for pair in pairs])
    with atomic_folder(to) as folder:
        site = folder / SITE
        (site / "files").mkdir(parents=True)
        shelf = Shelf(site / "files")
        tasks, key = _tasks(pairs, by_name, plan, shelf, draw, progress)
        _check_systems_differ(tasks, key)
        identity = _hashed([plan.title, questions, *(task.id for task in tasks)])
        study = Study(
            manifest=Manifest(
                format=FORMAT,
                id=identity,
                title=plan.title,
                questions=questions,
                num_repeats=plan.num_repeats,
                tasks=tuple(tasks),
            ),
            systems=tuple(by_name),
            key=key,
            rule=plan.rule,
            seed=plan.seed,
        )
        (folder / STUDY_FILE).write_text(study.to_json(), encoding="utf-8")
        write_site(site, study.manifest)
    return study


def _hashed(what: Sequence[Any]) -> str:
    return hashlib.sha256(json.dumps(what).encode()).hexdigest()[:_ID_DIGITS]


def write_site(site: Path, manifest: Manifest) -> None:
    """Write the page and its manifest, which is a script, as pages in files may not fetch."""
    for name in PAGE_FILES:
        text = (_PAGE / name).read_text(encoding="utf-8")
        if name.endswith(".css"):
            text = STYLE.read_text(encoding="utf-8") + text
        (site / name).write_text(text, encoding="utf-8")
    (site / MANIFEST_SCRIPT).write_text(manifest_script(manifest), encoding="utf-8")


def manifest_script(manifest: Manifest) -> str:
    """Return the script by which the page knows the manifest."""
    return f"window.STUDY = {json.dumps(manifest.model_dump(mode='json'))};\n"


def _questions(plan: StudyPlan, sources: Sequence[VideoSource]) -> dict[str, str]:
    """Return the questions that can be asked; one that was named must be possible."""
    lacking = {}
    for source in sources:
        if source.prompt is None:
            lacking["prompt"] = f"{source.path} has no prompt"
        if source.photo is None:
            lacking["image"] = f"the photo of {source.path} is not known"
    for name in plan.questions or ():
        if name in lacking:
            raise DataError(
                f"The question `{name}` cannot be asked: {lacking[name]}.",
                fix="Give photos with `images=`, prompts beside the videos, or other questions.",
            )
    asked = plan.questions or [name for name in QUESTIONS if name not in lacking]
    return {name: text for name, text in QUESTIONS.items() if name in asked}


def _tasks(
    pairs: Sequence[PlannedPair],
    systems: dict[str, System],
    plan: StudyPlan,
    shelf: Shelf,
    draw: random.Random,
    progress: Callable[[str, int], None],
) -> tuple[list[Task], dict[str, ComparedPair | AttentionCheck]]:
    """Encode all videos, and lay the pairs out on forms, each with checks of its own."""
    scenes = {key: number for number, key in enumerate(dict.fromkeys(one.scene for one in pairs))}
    sizes = {}
    for scene in scenes:
        paths = [one.by_key[scene].path for one in systems.values() if scene in one.by_key]
        sizes[scene] = common_size(paths, [Shape.of(path) for path in paths])
    tasks: list[Task] = []
    key: dict[str, ComparedPair | AttentionCheck] = {}
    photos: dict[Path, str] = {}

    def add(files: tuple[str, str], source: VideoSource, form: int) -> str:
        if source.photo is not None and source.photo not in photos:
            photos[source.photo] = shelf.put_photo(source.photo)
        task = Task(
            id=_hashed([*files, form, len(tasks), plan.seed]),
            form=form,
            first=files[0],
            second=files[1],
            photo=None if source.photo is None else photos[source.photo],
            prompt=None if source.prompt is None else source.prompt[:_MOST_PROMPT],
        )
        tasks.append(task)
        return task.id

    for form, on_form in enumerate(_forms(pairs, most=plan.per_rater)):
        for pair in on_form:
            sources = [systems[name].by_key[pair.scene] for name in (pair.first, pair.second)]
            first, second = (shelf.put_video(one.path, sizes[pair.scene]) for one in sources)
            name = add((first, second), sources[0], form)
            key[name] = ComparedPair(first=pair.first, second=pair.second, scene=scenes[pair.scene])
            progress(sources[0].path.name, 1)
        turn = draw.randrange(2)
        for number in range(plan.num_checks):
            pair = draw.choice(on_form)
            source = systems[pair.first].by_key[pair.scene]
            expected = "left" if (number + turn) % 2 else "right"
            frames, rate = check_card(source.path, sizes[pair.scene], expected=expected)
            card = shelf.put_frames(frames, rate)
            key[add((card, card), source, form)] = AttentionCheck(expected=expected)  # type: ignore[arg-type]
    draw.shuffle(tasks)  # the manifest's order says nothing of what a task is
    return tasks, key


def _forms(pairs: Sequence[PlannedPair], *, most: int) -> list[Sequence[PlannedPair]]:
    """Cut the pairs into forms of one length, or raters of the last would judge a pair or two."""
    num = math.ceil(len(pairs) / most)
    ends = [at * len(pairs) // num for at in range(num + 1)]
    return [pairs[start:end] for start, end in itertools.pairwise(ends)]


def _check_systems_differ(
    tasks: Sequence[Task], key: Mapping[str, ComparedPair | AttentionCheck]
) -> None:
    """Refuse two systems whose videos are the same in every scene, frame for frame."""
    differ: dict[tuple[str, ...], bool] = {}
    for task in tasks:
        what = key[task.id]
        if isinstance(what, ComparedPair):
            pair = tuple(sorted((what.first, what.second)))
            differ[pair] = differ.get(pair, False) or task.first != task.second
    for (one, other), is_different in differ.items():
        if not is_different:
            raise DataError(
                f"The videos of {one} and {other} are the same, frame for frame.",
                fix="Give each system the folder of its own videos.",
            )
