"""A batch on several hosts of a Ray cluster: a bad or lost host costs no video, and is named."""

from __future__ import annotations

import json
import os
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from motionmerge.errors import CheckpointError
from motionmerge.sampling.batch import ray_driver
from motionmerge.sampling.batch.batch import BatchOptions, BatchProgress, Tally
from motionmerge.sampling.batch.manifest import plan, read_manifest
from motionmerge.sampling.batch.ray_batch import run_on_ray
from motionmerge.sampling.request.experts import ExpertChoice
from motionmerge.sampling.request.model import ShippedModel
from motionmerge.sampling.videos.settings import VideoSettings

from ..tiny.pipelines import photo
from .test_batch import write_manifest

ray = pytest.importorskip("ray", reason="Ray is not installed: pip install 'motionmerge[ray]'")

pytestmark = pytest.mark.slow

# So that no worker imports the tests.
ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])

FAST = VideoSettings(prompt="the camera pans left", height=64, width=64, num_inference_steps=1)
COUNT = 7


@dataclass(frozen=True)
class OnHosts(ShippedModel):
    """The pocket model, on four hosts.

    `no-model` cannot load it. `no-images` works in a folder without the photo. `new` makes a video
    without end. `first` makes a video, and goes on once `new` is at work.
    """

    folder: str = ""

    def load(self, encode: Any = None) -> tuple[Any, str]:
        host, folder = os.environ["HOST"], Path(self.folder)
        (folder / f"loaded-{host}").touch()
        if host == "no-model":
            raise CheckpointError("There is no model here.", fix="Copy it.")
        if host == "no-images":
            os.chdir(folder / "empty")
            return super().load(encode)
        os.chdir(folder)
        while not (folder / "loaded-no-images").exists():
            time.sleep(0.05)
        pipeline, where = super().load(encode)
        start, made, is_at_work = type(pipeline).__call__, [], folder / "new-is-at-work"

        def call(pipeline: Any, *arguments: Any, **options: Any) -> Any:
            if host == "new":
                is_at_work.touch()
                time.sleep(600)
            while made and not is_at_work.exists():
                time.sleep(0.05)
            made.append(1)
            return start(pipeline, *arguments, **options)

        pipeline.__class__ = type("PocketPipeline", (type(pipeline),), {"__call__": call})
        return pipeline, where


@pytest.mark.skipif(not Path("/proc/self/cwd").exists(), reason="Linux has it")
def test_bad_hosts_are_named_one_that_joins_is_used_and_a_lost_one_costs_nothing(
    add_host: Callable[..., Any],
    ray_cluster: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(ray_driver, "_SECONDS_BETWEEN_LOOKS", 0.2)
    Path("empty").mkdir()
    photo(24).save("photo.png")
    Path("broken.png").write_bytes(b"no image")
    photos = Path("/proc/self/cwd")  # in each process another folder
    rows = [{"image": str(photos / "photo.png"), "seed": seed} for seed in range(COUNT)]
    rows.insert(2, {"image": str(photos / "broken.png"), "id": "broken"})
    jobs = read_manifest(write_manifest(tmp_path, rows), defaults=FAST)
    videos = plan(jobs, tmp_path / "videos", fingerprint={})
    hosts = {name: add_host(name) for name in ("no-model", "no-images")}

    def join_and_be_lost(progress: BatchProgress) -> None:
        if "new" not in hosts:
            hosts["new"] = add_host("new")
        elif Path("new-is-at-work").exists() and hosts["new"] in ray_cluster.worker_nodes:
            ray_cluster.remove_node(hosts["new"], allow_graceful=False)

    tally = Tally(len(videos), failure_list=Path("failures.jsonl"), on_progress=join_and_be_lost)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        report = run_on_ray(
            OnHosts(folder=str(tmp_path)), ExpertChoice(), videos, BatchOptions(), tally=tally
        )
    assert (len(report.done), len(set(report.done))) == (COUNT, COUNT)
    assert hosts["new"] not in ray_cluster.worker_nodes
    given_up = sorted(str(one.message) for one in seen if "gives up the host" in str(one.message))
    assert len(given_up) == 2
    for reason, host in (
        ("could not load the model. There is no model here.", "no-model"),
        ("3 videos in a row failed there. Cannot read the image", "no-images"),
    ):
        assert any(
            reason in warning and f"Ray node {hosts[host].node_id[:12]})" in warning
            for warning in given_up
        )
    (line,) = map(json.loads, Path("failures.jsonl").read_text().splitlines())
    assert line["id"] == "broken" and "Ray node" in line["host"]
    assert hosts["no-images"].node_id[:12] not in line["host"]
