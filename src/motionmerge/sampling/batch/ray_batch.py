"""A batch on many machines: workers of a Ray cluster, each with the model loaded once.

The driver hands the next few videos to whichever worker is ready. What a dead worker did not finish
goes to the others; a new one takes its place. Videos are files, written whole, so that nothing else
has to be remembered: the output folder must be the same for all machines.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from motionmerge.io.atomic import prepare_folder
from motionmerge.sampling.batch.batch import BatchOptions, BatchReport, Tally
from motionmerge.sampling.batch.manifest import PlannedVideo
from motionmerge.sampling.batch.ray_cluster import joined_cluster, num_places
from motionmerge.sampling.batch.ray_driver import RayDriver
from motionmerge.sampling.batch.ray_hosts import Hosts
from motionmerge.sampling.batch.ray_queue import VideoQueue
from motionmerge.sampling.batch.ray_worker import Worker, sent_functions, with_absolute_paths
from motionmerge.sampling.batch.variants import PlannedVariant, VariantMaker
from motionmerge.sampling.request.experts import ExpertChoice
from motionmerge.sampling.request.model import ModelChoice


def run_on_ray(
    model: ModelChoice,
    experts: ExpertChoice,
    videos: Sequence[PlannedVideo],
    options: BatchOptions,
    *,
    num_workers: int | None = None,
    tally: Tally | None = None,
) -> BatchReport:
    """Make videos on a Ray cluster.

    Args:
        model, experts: What makes them; every machine finds the files at the same paths.
        videos: What to make: those that are `missing`. One that a worker made counts only if its
            file is there for this process as well.
        options: How. A video with which a worker dies alone is retried as one that failed.
        num_workers: By default one for each GPU; on CPUs one for as many cores as torch uses here;
            also of hosts that join later.
        tally: Counts the videos.

    Warns:
        UserWarning: For a while no worker has started, perhaps as all places are taken; or a host
            is given up, as it could not load the model, or lacked files several times in a row.

    Raises:
        ConfigError: Ray is not installed, the cluster cannot be joined or has no machine for a
            worker, workers die before they have loaded the model, a function that a user
            registered cannot be sent to them, or the folder cannot be made.
        MotionMergeError: As loading the model and attaching the experts, if no host is left.
    """
    tally = tally or Tally(len(videos))
    tally.begins_loading()
    ray = joined_cluster()
    functions = sent_functions(experts)
    model, experts, videos = with_absolute_paths(model, experts, videos)
    threads = torch.get_num_threads()
    needs = {"GPU": 1, "CPU": 1} if model.device.type == "cuda" else {"CPU": threads}
    num_places(ray, needs)
    for folder in {video.path.parent for video in videos}:
        prepare_folder(folder)
    options_of_ray = {"num_cpus": needs["CPU"], "num_gpus": needs.get("GPU", 0), "max_restarts": 0}
    actor_class = ray.remote(**options_of_ray)(Worker)
    hosts = Hosts(ray.nodes, needs)
    driver = RayDriver(
        ray=ray,
        new_worker=lambda where: actor_class.options(scheduling_strategy=where).remote(
            model, experts, options, threads, functions
        ),
        hosts=hosts,
        needs=needs,
        free={name: ray.available_resources().get(name, 0) for name in needs},
        queue=VideoQueue(videos, hosts=hosts, retries=options.retries, tally=tally),
        num_workers=num_workers,
    )
    return driver.run()


class RayVariantMaker(VariantMaker):
    """Makes videos on a Ray cluster, whose workers load the model for every variant.

    Args:
        model: What makes the videos; see `run_on_ray`.
        folder: Where they go, the same for all machines.
        num_workers: As for `run_on_ray`.
    """

    def __init__(self, model: ModelChoice, folder: Path, *, num_workers: int | None = None) -> None:
        super().__init__(model, folder)
        self.kind = f"{model.name} on {num_workers or 'all'} workers"
        self._num_workers = num_workers

    def prepare(self) -> None:
        """Do nothing: this process needs no model."""

    def make(
        self, planned: PlannedVariant, videos: Sequence[PlannedVideo], *, tally: Tally
    ) -> None:
        """Make videos of a variant on the cluster.

        Raises:
            MotionMergeError: As `run_on_ray`.
        """
        if videos:
            run_on_ray(
                self.model,
                planned.experts,
                videos,
                self.options(planned),
                num_workers=self._num_workers,
                tally=tally,
            )
