"""`motionmerge study`: people judge pairs of videos, from the study's size to its result."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from motionmerge.cli.help import Verb, VerbGroup
from motionmerge.cli.measure import needs_eval_extra
from motionmerge.cli.merge import counting_bar
from motionmerge.cli.options import (
    JsonOption,
    OutputOption,
    OverwriteOption,
    destination,
    output_option,
    work_option,
)
from motionmerge.cli.printing import aligned, harmless, print_json, quoted

if TYPE_CHECKING:
    from motionmerge.evaluation.study.analysis import StudyResult

EXAMPLE = "Example: motionmerge study build base=videos/a ours=videos/b -o study"

study_app = typer.Typer(
    help="Let people judge videos: a static page of pairs, and honest statistics.",
    epilog=EXAMPLE,
    cls=VerbGroup,
    no_args_is_help=True,
)

StudyArgument = Annotated[
    Path, typer.Argument(metavar="STUDY", help="The folder that `study build` wrote.")
]
PerRaterOption = Annotated[
    int,
    work_option(
        min=1, max=1000, metavar="NUMBER", help="Pairs of each rater, besides checks and repeats."
    ),
]


@study_app.command(
    "plan", cls=Verb, epilog="Example: motionmerge study plan --scenes 40 --preference 0.6"
)
def plan(
    scenes: Annotated[
        int, typer.Option(min=1, metavar="NUMBER", help="Prompts with photo and seed per system.")
    ],
    systems: Annotated[
        int, typer.Option(min=2, metavar="NUMBER", help="Systems; each is compared with each.")
    ] = 2,
    preference: Annotated[
        float,
        typer.Option(
            metavar="SHARE", help="Wins among judgements with a winner that is to be found."
        ),
    ] = 0.6,
    ties: Annotated[
        float, typer.Option(metavar="SHARE", help="Judgements without a winner.")
    ] = 0.2,
    power: Annotated[float, typer.Option(metavar="SHARE", help="Probability of finding it.")] = 0.8,
    level: Annotated[
        float,
        typer.Option(
            metavar="SHARE",
            help="Probability of finding anything where nothing is, over all tests.",
        ),
    ] = 0.05,
    questions: Annotated[
        int, typer.Option(min=1, metavar="NUMBER", help="Questions that are asked of each pair.")
    ] = 5,
    scene_correlation: Annotated[
        float,
        typer.Option(
            metavar="SHARE",
            help="How much judgements of one scene resemble each other (intraclass correlation).",
        ),
    ] = 0.05,
    per_rater: PerRaterOption = 20,
    as_json: JsonOption = False,
) -> None:
    """Compute how many judgements and raters a study needs for a wanted power.

    An exact binomial test at the level divided by all tests (Bonferroni), which is more cautious
    than the analysis (Holm).
    """
    with needs_eval_extra():
        from motionmerge.evaluation.study.power import study_size

    size = study_size(
        num_systems=systems,
        num_scenes=scenes,
        preference=preference,
        ties=ties,
        power=power,
        level=level,
        num_questions=questions,
        per_rater=per_rater,
        scene_correlation=scene_correlation,
    )
    if as_json:
        print_json(asdict(size))
        return
    print(
        f"{size.per_pair} judgements of each of {size.num_pairs} pairs of systems, "
        f"{size.total} in all; {size.num_decisive} with a winner would do if all were independent."
    )
    print(
        f"{size.num_raters} raters with {per_rater} pairs each, about {size.minutes:.0f} minutes, "
        "if raters are alike; some more for those whom the rule excludes."
    )
    if size.num_raters * per_rater > size.total + per_rater:
        print("That is more judgements: a few raters alone say little of other people.")


@study_app.command("build", cls=Verb, epilog=EXAMPLE)
def build(
    systems: Annotated[
        list[str],
        typer.Argument(
            metavar="SYSTEMS",
            help="Two or more folders of videos, as `batch` or `sweep` wrote them; NAME=PATH "
            "names one. Raters never see names.",
        ),
    ],
    images: Annotated[
        Path | None,
        typer.Option(
            metavar="PATH", help="Photos that the videos were made from, as for `measure`."
        ),
    ] = None,
    question: Annotated[
        list[str] | None,
        work_option(
            metavar="NAME",
            help="What is asked: motion, prompt, quality, image, overall; repeatable.",
            show_default="all that prompts and photos allow",
        ),
    ] = None,
    baseline: Annotated[
        str | None,
        work_option(
            metavar="NAME",
            help="Compare the others with this system only.",
            show_default="all pairs",
        ),
    ] = None,
    per_rater: PerRaterOption = 20,
    checks: Annotated[
        int, work_option(min=0, max=100, metavar="NUMBER", help="Attention checks of each rater.")
    ] = 2,
    repeats: Annotated[
        int,
        work_option(min=0, max=100, metavar="NUMBER", help="Pairs shown again with swapped sides."),
    ] = 2,
    failed_checks: Annotated[
        int,
        work_option(
            min=0, metavar="NUMBER", help="Failed checks that a rater may have and still counts."
        ),
    ] = 0,
    title: Annotated[
        str, work_option(metavar="TEXT", help="Above the page.")
    ] = "Which video is better?",
    seed: Annotated[int, work_option(metavar="NUMBER", help="Of orders and sides.")] = 0,
    output: OutputOption = Path("study"),
    as_json: JsonOption = False,
    overwrite: OverwriteOption = False,
) -> None:
    """Build a study: a folder `site` to host anywhere or open as a file, and a key to keep.

    All videos are encoded alike and named by their content. The rule for excluding raters is
    written into `study.json`, whose hash you can publish before you ask anybody.
    """
    with needs_eval_extra():
        from motionmerge.evaluation.report.sets import split_name
        from motionmerge.evaluation.sources import Photos
        from motionmerge.evaluation.statistics import fewest_to_be_sure
        from motionmerge.evaluation.study.build import StudyPlan, build_study
        from motionmerge.evaluation.study.manifest import SITE, STUDY_FILE, ExclusionRule
        from motionmerge.evaluation.study.pairs import find_systems
        from motionmerge.io.atomic import check_new_folder
        from motionmerge.io.hashing import hash_file

    folders = [split_name(text)[1] for text in systems]
    check_new_folder(output, overwrite=overwrite, marker=STUDY_FILE, keep=folders)
    wanted = StudyPlan(
        title=title,
        questions=None if not question else list(dict.fromkeys(question)),
        baseline=baseline,
        per_rater=per_rater,
        num_checks=checks,
        num_repeats=repeats,
        rule=ExclusionRule(most_failed_checks=failed_checks),
        seed=seed,
    )
    found = find_systems(systems, Photos.at(images))
    with counting_bar(None, shown=not as_json) as tell:
        study = build_study(found, to=output, plan=wanted, progress=tell)
    tasks, forms = study.manifest.tasks, study.manifest.num_forms
    key_hash = hash_file(output / STUDY_FILE)
    if as_json:
        about = {"study": study.manifest.id, "site": str(output / SITE), "key": key_hash}
        asked = {"questions": list(study.manifest.questions), "forms": forms, "tasks": len(tasks)}
        print_json({**about, **asked})
        return
    each = f"; a rater gets one of {forms} forms" if forms > 1 else ""
    print(f"Wrote {harmless(str(output / SITE))}: {len(tasks)} pairs and checks{each}.")
    print(f"Questions: {', '.join(study.manifest.questions)}")
    needed = fewest_to_be_sure(len(study.compared) * len(study.manifest.questions))
    if study.num_scenes < needed:
        print(
            f"{study.num_scenes} scenes show no difference for sure, whoever answers: these pairs "
            f"and questions take {needed}."
        )
    print(f"Key and rule, to keep for yourself: {STUDY_FILE}, {key_hash}")
    print(f"Try it: motionmerge study serve {quoted(output)}")


@study_app.command("serve", cls=Verb, epilog="Example: motionmerge study serve study")
def serve(
    study: StudyArgument,
    host: Annotated[
        str,
        typer.Option(metavar="ADDRESS", help="Where to listen; 127.0.0.1 is this machine only."),
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, metavar="NUMBER")] = 8011,
) -> None:
    """Show a study and append answers to STUDY/answers.jsonl, until Ctrl-C.

    It shows the study's own files and takes the answers that its manifest allows, nothing else.
    For raters elsewhere put it behind a web server that speaks HTTPS.
    """
    with needs_eval_extra():
        from motionmerge.evaluation.study.server import StudyServer

    with StudyServer(study, host=host, port=port) as server:
        forms = server.book.manifest.num_forms
        print(f"Serving {server.url}  (Ctrl-C ends it)", flush=True)
        if forms > 1:
            print(f"Of {forms} forms each rater gets one by chance; ?form=1 picks one.", flush=True)
        server.serve_forever()


@study_app.command("analyse", cls=Verb, epilog="Example: motionmerge study analyse study")
def analyse(
    study: StudyArgument,
    answers: Annotated[
        list[Path] | None,
        typer.Argument(
            metavar="ANSWERS",
            help="Files that raters saved, or folders of such.",
            show_default="STUDY/answers.jsonl",
        ),
    ] = None,
    note: Annotated[
        str | None,
        output_option(
            metavar="TEXT", help="Above the chart, such as who was asked.", show_default="nothing"
        ),
    ] = None,
    output: Annotated[
        Path,
        destination(
            metavar="FOLDER", help="Folder for results.json, judgements.csv, chart.png and .svg."
        ),
    ] = Path("study-results"),
    as_json: JsonOption = False,
    overwrite: OverwriteOption = False,
) -> None:
    """Compute wins, ties and losses with intervals, agreement and strengths, and draw them.

    Raters whom the study's own rule excludes do not count; they stay in the table with the reason.
    """
    with needs_eval_extra():
        from motionmerge.evaluation.figures import to_png, to_svg
        from motionmerge.evaluation.study.analysis import analyse as analysed
        from motionmerge.evaluation.study.answers import read_answers
        from motionmerge.evaluation.study.chart import study_chart
        from motionmerge.evaluation.study.manifest import ANSWERS_FILE, STUDY_FILE, read_study
        from motionmerge.evaluation.tables import csv_text
        from motionmerge.io.atomic import check_new_file, write_whole
        from motionmerge.io.hashing import hash_file

    names = ("results.json", "judgements.csv", "chart.png", "chart.svg")
    for name in names:
        check_new_file(output / name, overwrite=overwrite)
    whole = read_study(study)
    result = analysed(read_answers(answers or [study / ANSWERS_FILE], whole.manifest), whole)
    found = {"key": hash_file(study / STUDY_FILE), **result.to_dict()}
    chart = study_chart(result, note=note or "")
    contents: tuple[str | bytes, ...] = (
        json.dumps(found, indent=1) + "\n",
        csv_text([asdict(one) for one in result.judgements]),
        to_png(chart),
        to_svg(chart),
    )
    for name, content in zip(names, contents, strict=True):
        write_whole(output / name, content)
    if as_json:
        print_json(found)
        return
    _print_result(result)
    print(f"The rule was that of {STUDY_FILE}, {found['key']}")
    print(f"Wrote {', '.join(names)} to {harmless(str(output))}")


def _print_result(result: StudyResult) -> None:
    from motionmerge.evaluation.statistics import fewest_to_be_sure

    excluded = [one for one in result.raters.values() if one.reason]
    counted = len(result.raters) - len(excluded)
    print(f"{counted} raters count, {len(excluded)} are excluded by the study's rule.")
    for one in excluded:
        print(f"  {one.rater[:8]}: {one.reason}")
    if result.num_changed:
        print(f"{result.num_changed} answers came again with other contents; the first counts.")
    rows: list[tuple[Any, ...]] = [("question", "systems", "win", "tie", "loss", "preference", "p")]
    for pair in result.pairs:
        shares = (f"{100 * one.value:.0f}%" for one in (pair.wins, pair.ties, pair.losses))
        systems = f"{pair.system} : {pair.other}"
        value = pair.preference.text(2, sign=True)
        rows.append((pair.question, systems, *shares, value, f"{pair.p_value:.3f}"))
    print()
    for line in aligned([[harmless(str(cell)) for cell in row] for row in rows], numbers=False):
        print(line)
    found = {(one.system, one.other) for one in result.pairs}
    lacking = [pair for pair in result.study.compared if pair not in found]
    if lacking:
        print(f"Nobody judged {harmless(', '.join(map(' : '.join, lacking)))}.")
    needed = fewest_to_be_sure(len(result.pairs))
    if all(min(one.num_scenes, one.num_raters) < needed for one in result.pairs):
        print(f"No p can get below 0.05: that takes {needed} scenes and {needed} raters of a pair.")
    print()
    for name, question in result.questions.items():
        repeat = question.repeat_agreement
        same = "" if repeat is None else f", {100 * repeat.value:.0f}% the same when asked again"
        sides, p = question.left_share, question.left_p_value
        left = f"left {100 * sides.value:.0f}% (p {p:.2f})" if sides.num else "nobody named a side"
        alpha = question.agreement
        agreement = "no agreement to speak of" if math.isnan(alpha) else f"alpha {alpha:.2f}"
        print(f"{name}: {agreement}, {left}{same}")
    print()
