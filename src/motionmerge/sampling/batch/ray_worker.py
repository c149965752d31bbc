"""A worker of a batch on a Ray cluster, and what it is sent: all that another process needs.

Processes of the cluster run in folders of their own, so what they are sent has absolute paths.
"""

from __future__ import annotations

import pickle
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from motionmerge.errors import ConfigError
from motionmerge.merging.recipes.functions import called_functions, register_missing
from motionmerge.sampling.batch.batch import BatchOptions, BatchReport, run_batch
from motionmerge.sampling.batch.manifest import PlannedVideo
from motionmerge.sampling.batch.ray_hosts import lack_of
from motionmerge.sampling.request.experts import ExpertChoice
from motionmerge.sampling.request.loading import hide_loading_bars, show_progress
from motionmerge.sampling.request.model import FolderModel, ModelChoice, ShippedModel
from motionmerge.sampling.videos.phases import can_be_cut


class Worker:
    """What lives in a process of the cluster: a pipeline with its experts.

    Args:
        model, experts, options: How the videos are made.
        num_threads: Of torch, on which the last bit of a sum can depend.
        functions: Functions of the recipe language that users registered in the driver.
    """

    def __init__(
        self,
        model: ModelChoice,
        experts: ExpertChoice,
        options: BatchOptions,
        num_threads: int,
        functions: Mapping[str, Mapping[str, Any]],
    ) -> None:
        register_missing(functions)
        self._model, self._experts, self._options = model, experts, options
        self._num_threads = num_threads
        self._attached = ExitStack()

    def answer(self) -> str:
        """Return the node's id: a worker that answered has begun what it was given next."""
        import ray

        return str(ray.get_runtime_context().get_node_id())

    def load(self) -> int:
        """Load the model; give how many videos the worker wants at a time."""
        hide_loading_bars()
        torch.set_num_threads(self._num_threads)
        self._pipeline, _ = self._model.load()
        show_progress(self._pipeline, is_quiet=True)
        self._bank = self._attached.enter_context(self._experts.attach(self._pipeline))
        shares_switches = self._bank is not None and can_be_cut(self._pipeline)
        return self._options.videos_per_switch if shares_switches else 1

    def make(self, videos: Sequence[PlannedVideo]) -> tuple[BatchReport, dict[str, str]]:
        """Make some videos; return also which could not be begun, and what the host lacks."""
        lacks = {video.path.name: lack for video in videos if (lack := lack_of(video))}
        possible = [video for video in videos if video.path.name not in lacks]
        return run_batch(self._pipeline, possible, self._options, bank=self._bank), lacks


def sent_functions(experts: ExpertChoice) -> dict[str, Mapping[str, Any]]:
    """Return the functions of users that a recipe calls, for the processes of workers.

    Raises:
        ConfigError: Names one that cannot be sent to another process.
    """
    from ray import cloudpickle

    functions = {} if experts.recipe is None else called_functions(experts.recipe.experts.values())
    for name, registered in functions.items():
        try:
            cloudpickle.dumps(registered)  # type: ignore[no-untyped-call]  # Ray's own
        except (TypeError, ValueError, pickle.PicklingError) as error:
            raise ConfigError(
                f"The registered function `{name}` cannot be sent to the workers of a cluster: "
                f"{error}.",
                fix="Let it use plain values alone, no open files or locks; or merge the experts "
                "first with `motionmerge.merge`, and give the workers the merged files.",
            ) from error
    return functions


def with_absolute_paths(
    model: ModelChoice, experts: ExpertChoice, videos: Sequence[PlannedVideo]
) -> tuple[ModelChoice, ExpertChoice, list[PlannedVideo]]:
    """Make every path mean the same in a process with another working folder."""
    if isinstance(model, ShippedModel) and Path(model.weights).suffix:
        model = replace(model, weights=str(Path(model.weights).absolute()))
    elif isinstance(model, FolderModel):
        folder = model.folder
        weights = {part: _absolute(files) for part, files in folder.weights.items()}
        others = _absolute(folder.others)
        path = folder.path.absolute()
        model = replace(model, folder=replace(folder, path=path, weights=weights, others=others))
    if experts.recipe is not None:
        folder_of_recipe = (experts.recipe.folder or Path()).absolute()
        experts = replace(experts, recipe=replace(experts.recipe, folder=folder_of_recipe))
    return model, experts, [_absolute_video(video) for video in videos]


def _absolute(paths: Sequence[Path]) -> tuple[Path, ...]:
    return tuple(path.absolute() for path in paths)


def _absolute_video(video: PlannedVideo) -> PlannedVideo:
    job = replace(video.job, image=video.job.image.absolute())
    return replace(video, job=job, path=video.path.absolute())
