"""`motionmerge compare-knobs`: every way to more motion that a model has, on the same photos."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from motionmerge.cli.bench import POCKET_CLIPS, SceneFlags, open_model
from motionmerge.cli.flag_groups import with_flags
from motionmerge.cli.measure import needs_eval_extra
from motionmerge.cli.options import ClipsOption, JsonOption, PlanOption, ResultsOption
from motionmerge.cli.sweep import SweepPage, run_points
from motionmerge.cli.video_flags import POCKET, VideoFlags
from motionmerge.errors import ConfigError

if TYPE_CHECKING:
    from motionmerge.sampling.batch.manifest import VideoJob
    from motionmerge.sampling.request.model import ModelChoice

EXAMPLE = "Example: motionmerge compare-knobs --clips 4 -o knobs"

_SCENES = "scenes"


@with_flags
def compare_knobs(
    output: ResultsOption,
    scenes: SceneFlags = SceneFlags(),
    clips: ClipsOption = None,
    flags: VideoFlags = VideoFlags(),
    dry_run: PlanOption = False,
    as_json: JsonOption = False,
) -> None:
    """Compare every way to make the videos of MODEL move more: same photos, one page of results.

    Each way is one set of videos. Other weights: tuned (the model as it is), and if --base says
    what it was tuned from, base, the paper's EDG, and the motion knob. Settings of the denoising,
    on tuned: ALG (a blurred photo), motion amplitude, a bias against the first frame. Then pairs.
    Ways that the model does not have are named, with the reason. The page has motion against
    fidelity and obedience, and paired differences from tuned with 95 % intervals. Without photos
    the pocket model has validation prompts of its own. The same command goes on after a kill.
    """
    with needs_eval_extra():
        from motionmerge.evaluation.sweeps.knob_points import TUNED, knob_points
    from motionmerge.switching.knob_families import knob_family

    _check_flags(flags)
    own = replace(flags, base=None, replaced=None, motion=None)
    model = open_model(own, scenes)
    tuned, base = _weights(flags, model)
    found = knob_points(
        knob_family(model.family.pipelines[0], model.configs),
        tuned=tuned,
        base=base,
        motion=flags.motion,
    )
    for name, reason in found.left_out.items():
        typer.echo(f"without {name}: {reason}", err=True)
    if len(found.points) == 1:
        raise ConfigError(
            f"There is nothing to compare {TUNED} with.",
            fix="Say what the model was tuned from: `base=MODEL`.",
        )
    page = SweepPage(
        model.name,
        title=f"Ways to more motion of {model.name}",
        left_out=found.left_out,
        most=len(found.points),
    )
    with tempfile.TemporaryDirectory() as planned:  # a plan writes nothing
        pictures = Path(planned) if dry_run else output / _SCENES
        run_points(
            found.points,
            own,
            model=model,
            read_jobs=lambda: _jobs(scenes, own, model, pictures, clips),
            output=output,
            page=page,
            dry_run=dry_run,
            as_json=as_json,
        )


def _check_flags(flags: VideoFlags) -> None:
    for name in ("recipe", "lora", "weights", "boundary"):
        if getattr(flags, name) is not None:
            raise ConfigError(
                f"--{name} is not for this verb, which has recipes of its own.",
                fix="Leave it out; `motionmerge sweep RECIPE` compares one recipe's numbers.",
            )
    if flags.changed:
        raise ConfigError("--set is not for this verb.", fix="Leave it out, or use `sweep`.")


def _weights(flags: VideoFlags, model: ModelChoice) -> tuple[str, str | None]:
    """Return the paths or names of the tuned weights, and of those they were tuned from."""
    from motionmerge.merging.recipes.recipe import OWN_MODEL

    given = dict(flags.request.inputs)
    unknown = [name for name in given if name not in ("tuned", "base")]
    if unknown:
        raise ConfigError(f"There is no input `{unknown[0]}` here.", fix="Name `tuned` or `base`.")
    tuned: str = OWN_MODEL
    base: str | None = None
    if flags.base is not None:
        if given:
            raise ConfigError(
                "--base is what the model was tuned from, and --input names other weights.",
                fix="Give --base alone, or `tuned` and `base` with --input.",
            )
        knob = replace(flags.request, motion=flags.motion or 0.0)
        recipe = knob.open_experts(model).recipe
        assert recipe is not None
        tuned, base = (recipe.inputs[name].path for name in ("tuned", "base"))
    elif model.path is None:
        tuned, base = "pocket:tuned", "pocket:base"
    base = given.get("base", base)
    if base is None and flags.motion is not None:
        raise ConfigError(
            "`motion=` is of the knob, and what the model was tuned from is not given.",
            fix="Add `base=MODEL`, or leave `motion=` out.",
        )
    return given.get("tuned", tuned), base


def _jobs(
    scenes: SceneFlags, flags: VideoFlags, model: ModelChoice, pictures: Path, clips: int | None
) -> Sequence[VideoJob]:
    """List the videos; of the pocket model without photos, those of its own prompts.

    Args:
        scenes: Photos and prompts.
        flags: What else decides the videos.
        model: What makes them.
        pictures: Where the first frames of the pocket model's own prompts go.
        clips: How many; all, or `POCKET_CLIPS`, if None.
    """
    from motionmerge.evaluation.sweeps.videos import spread

    if scenes == SceneFlags() and flags.model == POCKET:
        from motionmerge.evaluation.pocket.prompts import write_scenes
        from motionmerge.io.atomic import prepare_folder

        prepare_folder(pictures)
        manifest = write_scenes("validation", pictures, num=clips or POCKET_CLIPS)
        return SceneFlags(manifest=manifest).jobs(flags, model)
    jobs = scenes.jobs(flags, model)
    return jobs if clips is None else spread(jobs, seed=flags.seed)[:clips]
