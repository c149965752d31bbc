"""What `sweep`, `tune` and `probe` share: a recipe's weights, and what they are measured on."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from motionmerge.cli.batch import check_workers, cluster_device_of_ray, progress_printer
from motionmerge.cli.options import ManifestOption, PhotosOption, PromptsOption
from motionmerge.cli.video_flags import POCKET, VideoFlags, load_model, without_left_out
from motionmerge.errors import ConfigError

if TYPE_CHECKING:
    from motionmerge.evaluation.sweeps.observed import Bench
    from motionmerge.merging.recipes.recipe import Recipe
    from motionmerge.sampling.batch.manifest import VideoJob
    from motionmerge.sampling.batch.variants import Variant, VariantMaker
    from motionmerge.sampling.request.experts import ExpertChoice
    from motionmerge.sampling.request.model import ModelChoice

POCKET_CLIPS, POCKET_STEPS = 48, 12


@dataclass(frozen=True, kw_only=True)
class SceneFlags:
    """Which photos and prompts videos are made of."""

    photos: PhotosOption = None
    prompts: PromptsOption = None
    manifest: ManifestOption = None

    def jobs(self, flags: VideoFlags, model: ModelChoice) -> list[VideoJob]:
        """List the videos to make, each with the settings of the other flags.

        Raises:
            ConfigError, DataError: There are none, or they cannot be made with this model.
        """
        from motionmerge.evaluation.sweeps.videos import read_jobs

        defaults = flags.settings()
        return read_jobs(model, **vars(self), defaults=defaults, num_videos=flags.num_videos)


def own_recipe(flags: VideoFlags, name: str) -> Recipe:
    """Load the recipe that is the argument, with the parameters of --set and --motion.

    Raises:
        ConfigError: Flags ask for other weights than the recipe's.
    """
    from motionmerge.merging.recipes.recipe import Recipe

    for other in ("weights", "lora", "base"):
        if getattr(flags, other):
            raise ConfigError(
                f"--{other} is not for this verb, whose recipe is the argument.",
                fix="Leave it out; --input NAME=PATH replaces an input of the recipe.",
            )
    request = flags.request
    own = {**request.parameters, **({} if request.motion is None else {"motion": request.motion})}
    return Recipe.load(name).with_parameters(**own)


def open_model(
    flags: VideoFlags, scenes: SceneFlags, *, ray: bool = False, workers: int | None = None
) -> ModelChoice:
    """Open the model for this process, or for the workers of a Ray cluster, which is then joined.

    Raises:
        ConfigError: This is one of several processes, the flags of the cluster do not go with the
            others, or it cannot be joined.
    """
    from motionmerge.sampling.batch.batch import rank_and_world_size

    check_workers(ray, workers)
    if rank_and_world_size()[1] > 1:
        raise ConfigError(
            "This verb was started as one of several processes.",
            fix="Start one process, without torchrun or srun.",
        )
    if ray and scenes == SceneFlags():
        raise ConfigError(
            "--ray shares videos of photos, and none are given.",
            fix="Give --photos and --prompts, or leave --ray out.",
        )
    return flags.request.open_model(cluster_device=cluster_device_of_ray() if ray else None)


class VariantBuilder:
    """Finds the weights of recipes for a model, and checks that they fit; each only once.

    Args:
        flags: What else decides the weights.
        model: What they are for.
    """

    def __init__(self, flags: VideoFlags, model: ModelChoice) -> None:
        self._request, self._model = flags.request, model
        self._known: dict[tuple[str, float | None], ExpertChoice] = {}

    def __call__(self, name: str, recipe: Recipe, *, boundary: float | None = None) -> Variant:
        """Return a recipe's weights under a name, with another boundary if one is given."""
        from motionmerge.sampling.batch.variants import Variant

        key = recipe.print(), boundary
        if key not in self._known:
            request = replace(
                self._request, recipe=recipe, parameters={}, motion=None, boundary=boundary
            )
            self._known[key] = request.open_experts(self._model)
        return Variant(name, self._known[key])


def open_bench(
    flags: VideoFlags,
    model: ModelChoice,
    output: Path,
    *,
    scenes: SceneFlags,
    num_clips: int | None,
    ray: bool = False,
    workers: int | None = None,
) -> Bench:
    """Choose what is measured on; without photos, the pocket model's own prompts.

    Raises:
        ConfigError: There is nothing to measure on, or flags do not go with it.
    """
    from motionmerge.evaluation.sweeps.videos import VideoBench, spread

    settings = flags.settings()
    if scenes == SceneFlags() and flags.model == POCKET:
        from motionmerge.evaluation.pocket.bench import PocketBench

        given = settings.model_dump(exclude_defaults=True, exclude_none=True)
        for name in set(given) - {"num_inference_steps", "seed"}:
            raise ConfigError(
                f"`{name}` is not for the pocket model's own prompts, whose clips are all alike.",
                fix="Leave it out, or give `photos=` and `prompts=`.",
            )
        return PocketBench(
            output,
            num_clips=num_clips or POCKET_CLIPS,
            num_steps=settings.num_inference_steps or POCKET_STEPS,
            seed=settings.seed,
        )
    maker = variant_maker(model, output / "videos", ray=ray, workers=workers)
    chosen = spread(scenes.jobs(flags, model), seed=settings.seed)[:num_clips]
    return VideoBench(maker, chosen, output, on_progress=progress_printer(0, 1, 0))


def variant_maker(
    model: ModelChoice, folder: Path, *, ray: bool, workers: int | None
) -> VariantMaker:
    """Return what makes videos in this process, or on a Ray cluster."""
    if ray:
        from motionmerge.sampling.batch.ray_batch import RayVariantMaker

        return RayVariantMaker(model, folder, num_workers=workers)
    from motionmerge.sampling.batch.variants import VariantMaker

    return VariantMaker(model, folder, load=lambda: load_model(model))


@contextmanager
def warnings_as_lines() -> Iterator[None]:
    """Print warnings of what is made without the place in our code that they come from."""
    with without_left_out():
        warnings.showwarning = lambda message, *_, **__: tell(f"warning: {message}")
        yield  # the block above puts back what it was


def tell(text: str) -> None:
    """Print what was done, on stderr."""
    typer.echo(text, err=True)
