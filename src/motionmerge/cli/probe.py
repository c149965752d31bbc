"""`motionmerge probe`: at which noise levels an expert decides motion, obedience and appearance."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

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
    from motionmerge.evaluation.sweeps.observed import Bench
    from motionmerge.evaluation.sweeps.probe import Probe, Window
    from motionmerge.merging.recipes.recipe import Recipe
    from motionmerge.sampling.request.model import ModelChoice

EXAMPLE = "Example: motionmerge probe pocket -o probe"

_LOOKED_AT = ("motion", "obedience", "camera", "first_frame", "intact", "drift")


@with_flags
def probe(
    recipe: RecipeArgument,
    output: ResultsOption,
    expert: Annotated[
        str | None,
        expert_option(
            metavar="NAME",
            help="The expert inside the window; the recipe's other one denoises outside it.",
            show_default="the recipe's first",
        ),
    ] = None,
    windows: Annotated[
        int,
        work_option(
            min=2,
            max=100,
            metavar="NUMBER",
            help="How many places the window takes between noise and clean.",
        ),
    ] = 7,
    window: Annotated[
        float, work_option(metavar="NUMBER", help="Of the window, in noise levels.")
    ] = 0.25,
    scenes: SceneFlags = SceneFlags(),
    clips: ClipsOption = None,
    flags: VideoFlags = VideoFlags(),
    ray: RayOption = False,
    workers: WorkersOption = None,
    dry_run: PlanOption = False,
    as_json: JsonOption = False,
) -> None:
    """Find the noise levels at which an expert of RECIPE decides motion, obedience and appearance.

    It denoises inside a window that slides from noise to clean, and the recipe's other expert
    outside it. The change against the other expert alone is drawn, with 95 % intervals. The same
    command goes on after a kill. Without photos the pocket model is measured on validation prompts
    of its own.
    """
    with needs_eval_extra():
        from motionmerge.evaluation.sweeps.probe import (
            noisy_expert,
            other_expert,
            windows_of,
        )
        from motionmerge.evaluation.sweeps.probe import probe as measure_windows
    from motionmerge.io.atomic import check_folder, prepare_folder

    if flags.boundary is not None:
        raise ConfigError("--boundary is not for windows.", fix="Leave it out.")
    chosen = own_recipe(flags, recipe)
    inside = expert or noisy_expert(chosen)
    other_expert(chosen, inside)
    wanted = windows_of(windows, window)
    model = open_model(flags, scenes, ray=ray, workers=workers)
    check_folder(output)
    bench = open_bench(
        flags, model, output, scenes=scenes, num_clips=clips, ray=ray, workers=workers
    )
    build = VariantBuilder(flags, model)
    with_steps = _with_steps(flags, model, bench, chosen, wanted, expert=inside, build=build)
    if dry_run:
        _print_plan(with_steps, bench, as_json=as_json)
        return
    prepare_folder(output)
    with warnings_as_lines():
        found = measure_windows(
            bench,
            chosen,
            with_steps,
            expert=inside,
            build=build,
            objectives={
                name: bench.objectives[name] for name in _LOOKED_AT if name in bench.objectives
            },
            tell=tell,
        )
    left_out = [one for one in wanted if one not in with_steps]
    _write(found, output, recipe=recipe, expert=inside, bench=bench, left_out=left_out)
    if as_json:
        print((output / "probe.json").read_text(encoding="utf-8"))
    else:
        _print_results(found, output, expert=inside)


def _with_steps(
    flags: VideoFlags,
    model: ModelChoice,
    bench: Bench,
    recipe: Recipe,
    windows: Sequence[Window],
    *,
    expert: str,
    build: VariantBuilder,
) -> list[Window]:
    """Leave out windows in which no denoising step is, and say so.

    Raises:
        ConfigError: Fewer than two are left.
    """
    from motionmerge.evaluation.sweeps.probe import with_window

    own = flags.settings()
    if own.sigmas is None:
        own = own.changed(num_inference_steps=bench.num_steps)
    settings = own.resolved(model.family, model.limits)
    scheduler = model.scheduler()
    kept = []
    for window in windows:
        variant = build(window.name, with_window(recipe, window, expert=expert))
        plan = variant.experts.plan_steps(model, scheduler, settings)
        if plan is not None and f"`{expert}`" in (plan.warning or ""):
            tell(f"no step is in the window {window.name}, which is left out: {plan.line}")
        else:
            kept.append(window)
    if len(kept) < 2:
        raise ConfigError(
            f"Of {len(windows)} windows {len(kept)} have a denoising step of {bench.num_steps}.",
            fix="Give more --steps, or a larger --window.",
        )
    return kept


def _print_plan(windows: Sequence[Window], bench: Bench, *, as_json: bool) -> None:
    from motionmerge.evaluation.sweeps.pace import duration

    one = bench.seconds(num_clips=bench.num_clips, num_steps=bench.num_steps)
    seconds = None if one is None else one * (len(windows) + 2)
    if as_json:
        print_json({"windows": [vars(one) for one in windows], "seconds": seconds})
        return
    for window in windows:
        print(f"noise levels {window.name}")
    print(
        f"{len(windows)} windows and each expert alone, on {bench.about} with {bench.num_steps} "
        f"steps: {duration(seconds)}"
    )
    if line := _too_few(bench.num_clips, num_windows=len(windows)):
        print(line)


def _too_few(num_prompts: int, *, num_windows: int) -> str | None:
    """Describe why so few prompts can make no change sure, if they cannot."""
    from motionmerge.evaluation.statistics import fewest_to_be_sure

    needed = fewest_to_be_sure(num_windows)
    if num_prompts >= needed:
        return None
    return (
        f"{num_prompts} prompts are too few: no change can be sure among {num_windows} windows "
        f"with fewer than {needed}"
    )


def _write(
    found: Probe,
    output: Path,
    *,
    recipe: str,
    expert: str,
    bench: Bench,
    left_out: Sequence[Window],
) -> None:
    from motionmerge.evaluation.figures import to_svg
    from motionmerge.evaluation.sweeps.probe import probe_chart
    from motionmerge.io.atomic import write_whole

    means = {name: found.without.mean(one.metric) for name, one in found.objectives.items()}
    about = {
        "recipe": recipe,
        "expert": expert,
        "about": bench.about,
        "num_steps": bench.num_steps,
        "objectives": {name: one.metric for name, one in found.objectives.items()},
        "without": {name: mean.to_dict() for name, mean in means.items() if mean is not None},
        "throughout": found.everywhere.to_dict(found.objectives),
        "windows": [one.to_dict(found.objectives) for one in found.windows],
        "windows_without_steps": [{"from": one.high, "to": one.low} for one in left_out],
    }
    write_whole(output / "probe.json", json.dumps(about, indent=2, ensure_ascii=False) + "\n")
    write_whole(output / "probe.svg", to_svg(probe_chart(found, expert=expert)) + "\n")


def _print_results(found: Probe, output: Path, *, expert: str) -> None:
    for one in [*found.windows, found.everywhere]:
        texts = []
        for name, more in one.more.items():
            goal = found.objectives[name]
            texts.append(f"{name} {more.text(goal.digits, sign=True)} {goal.unit}".rstrip())
        print(f"{expert} from {one.window.name}: {'; '.join(texts)}")
    if line := _too_few(found.num_prompts, num_windows=len(found.windows)):
        print(line)
    for name in found.objectives:
        strongest = found.strongest(name)
        if strongest is None:
            print(f"no window surely changes {name}")
        else:
            print(f"{name} changes most from {strongest.window.name}")
    typer.echo(f"wrote {output / 'probe.svg'} and probe.json", err=True)
