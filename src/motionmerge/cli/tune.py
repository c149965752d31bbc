"""`motionmerge tune`: find the numbers of a recipe that suit a model, and write them as recipes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from motionmerge.cli.bench import (
    SceneFlags,
    VariantBuilder,
    open_bench,
    open_model,
    own_recipe,
    tell,
    warnings_as_lines,
)
from motionmerge.cli.flag_groups import with_flags
from motionmerge.cli.measure import needs_eval_extra
from motionmerge.cli.options import (
    ClipsOption,
    JsonOption,
    PlanOption,
    RayOption,
    RecipeArgument,
    ResultsOption,
    WorkersOption,
    expert_option,
    work_option,
)
from motionmerge.cli.printing import print_json
from motionmerge.cli.video_flags import VideoFlags
from motionmerge.errors import ConfigError

if TYPE_CHECKING:
    from motionmerge.evaluation.sweeps.space import Range
    from motionmerge.evaluation.sweeps.tune import Tuner, Tuning

EXAMPLE = "Example: motionmerge tune pocket --objective motion,obedience -o tuned"

_VIDEO_OBJECTIVES, _POCKET_OBJECTIVES = "motion,first_frame", "motion,obedience,intact"


@with_flags
def tune(
    recipe: RecipeArgument,
    output: ResultsOption,
    num_trials: Annotated[
        int,
        work_option(
            "--trials", "-n", min=1, max=1000, metavar="NUMBER", help="Candidates to try at most."
        ),
    ] = 30,
    objective: Annotated[
        str | None,
        work_option(
            metavar="NAMES",
            help="What to have much of, the most important first, with commas between: motion, "
            "object_motion, first_frame, camera, drift; on the pocket model's own prompts motion, "
            "obedience, intact, camera, direction, whole, first_frame, background.",
            show_default=f"{_VIDEO_OBJECTIVES}; on the pocket model's own {_POCKET_OBJECTIVES}",
        ),
    ] = None,
    over: Annotated[
        list[str] | None,
        expert_option(
            metavar="NAME=RANGE",
            help="A parameter of the recipe, or boundary, and what it may be: FROM:TO, "
            "FROM:TO:COUNT or A,B,C; repeatable.",
            show_default="all parameters known by name",
        ),
    ] = None,
    scenes: SceneFlags = SceneFlags(),
    clips: ClipsOption = None,
    flags: VideoFlags = VideoFlags(),
    ray: RayOption = False,
    workers: WorkersOption = None,
    dry_run: PlanOption = False,
    as_json: JsonOption = False,
) -> None:
    """Find the numbers of RECIPE that suit a model, and write the best as recipe files.

    Optuna proposes. Every candidate is measured on few videos with few steps, the best third on
    more, and the best of these on all; the search stops when the front has not moved for 12
    candidates. The same command goes on after a kill. Without photos the pocket model is measured
    on validation prompts of its own. Choose on these, and report numbers of others.
    """
    with needs_eval_extra():
        from motionmerge.evaluation.sweeps.space import space_of
        from motionmerge.evaluation.sweeps.tune import Tuner, pick_objectives
    from motionmerge.io.atomic import check_folder

    if flags.boundary is not None:
        raise ConfigError("--boundary is one value.", fix="Write --over boundary=0.4:0.9.")
    chosen = own_recipe(flags, recipe)
    space = space_of(chosen, over or ())
    model = open_model(flags, scenes, ray=ray, workers=workers)
    check_folder(output)
    bench = open_bench(
        flags, model, output, scenes=scenes, num_clips=clips, ray=ray, workers=workers
    )
    usual = _POCKET_OBJECTIVES if "obedience" in bench.objectives else _VIDEO_OBJECTIVES
    tuner = Tuner(
        bench,
        chosen,
        space,
        build=VariantBuilder(flags, model),
        objectives=pick_objectives(bench, objective or usual),
        folder=output,
        seed=flags.seed,
        tell=tell,
    )
    if dry_run:
        _print_plan(tuner, space, num_trials, about=bench.about, as_json=as_json)
        return
    with warnings_as_lines():
        tuning = tuner.run(num_trials)
    _write(tuning, output, recipe=recipe, about=bench.about, seed=flags.seed)
    if as_json:
        print((output / "tune.json").read_text(encoding="utf-8"))
    else:
        _print_results(tuning, output)


def _print_plan(
    tuner: Tuner, space: list[Range], num_trials: int, *, about: str, as_json: bool
) -> None:
    from motionmerge.evaluation.sweeps.pace import duration

    seconds = tuner.seconds(num_trials)
    if as_json:
        found = {
            "space": [vars(one) for one in space],
            "rungs": [vars(one) for one in tuner.rungs],
            "seconds": seconds,
        }
        print_json(found)
        return
    for one in space:
        values = "" if one.values is None else f" ({len(one.values)} values)"
        print(f"{one.name}: {one.low:g} to {one.high:g}{values}")
    for rung in tuner.rungs:
        print(f"{rung.num_clips} clips with {rung.num_steps} steps")
    print(f"{num_trials} candidates on {about}: {duration(seconds)}")


def _write(tuning: Tuning, output: Path, *, recipe: str, about: str, seed: int) -> None:
    """Write the front as recipes, all values, and a chart; recipes of an earlier front go."""
    from motionmerge.evaluation.figures import to_png
    from motionmerge.evaluation.sweeps.fronts import front_files, tuning_chart, tuning_to_dict
    from motionmerge.io.atomic import write_whole

    files = front_files(tuning, output, name=recipe, about=about, seed=seed)
    for name, text in files.items():
        write_whole(output / name, text)
    for stale in output.glob("front-*.yaml"):
        if stale.name not in files:
            stale.unlink()
    found = {
        "recipe": recipe,
        "about": about,
        "seed": seed,
        **tuning_to_dict(tuning, list(files)),
    }
    write_whole(output / "tune.json", json.dumps(found, indent=2, ensure_ascii=False) + "\n")
    if len(tuning.objectives) > 1:
        write_whole(output / "front.png", to_png(tuning_chart(tuning)))


def _print_results(tuning: Tuning, output: Path) -> None:
    from motionmerge.evaluation.sweeps.fronts import texts_of

    for number, one in enumerate(tuning.front, start=1):
        texts = "; ".join(texts_of(one, tuning.objectives))
        print(f"front-{number}.yaml  {one.candidate.variant.name}: {texts}")
    if tuning.num_failed:
        print(f"{tuning.num_failed} candidates could not be measured")
    num_lost = sum(one.observed.num_failed for one in tuning.tried)
    if num_lost:
        print(f"{num_lost} videos of these candidates failed, and are in no number")
    if tuning.stopped_early:
        print("stopped early: the front had not moved for 12 candidates")
    if tuning.chosen is tuning.reference:
        print(f"Keep {tuning.why}.")
    else:
        number = tuning.front.index(tuning.chosen) + 1
        print(f"Take {output / f'front-{number}.yaml'}: {tuning.why}.")
