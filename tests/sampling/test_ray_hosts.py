"""A batch on several hosts of a Ray cluster: one bad host costs no video, and is named."""

from __future__ import annotations

import os
import shutil
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from motionmerge.errors import CheckpointError, ConfigError
from motionmerge.sampling.batch import ray_driver
from motionmerge.sampling.batch.batch import BatchOptions, BatchReport, Tally, run_batch
from motionmerge.sampling.batch.manifest import PlannedVideo, plan, read_manifest
from motionmerge.sampling.batch.ray_batch import run_on_ray
from motionmerge.sampling.request.experts import ExpertChoice
from motionmerge.sampling.request.model import ShippedModel
from motionmerge.sampling.videos.make_video import VideoSettings

from ..tiny.pipelines import photo
from .test_batch import write_manifest

ray = pytest.importorskip("ray", reason="Ray is not installed: pip install 'motionmerge[ray]'")

pytestmark = pytest.mark.slow

FAST = VideoSettings(prompt="the camera pans left", height=64, width=64, num_inference_steps=1)


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """A cluster of two nodes, each with a place for one worker; `HOST` says which it is."""
    from ray.cluster_utils import Cluster

    os.environ.update(
        RAY_USAGE_STATS_ENABLED="0", RAY_worker_niceness="0", RAY_AUTH_MODE="disabled"
    )
    quiet = {"include_dashboard": False, "object_store_memory": 80_000_000}
    own = Cluster()
    for name in ("good", "bad"):
        own.add_node(num_cpus=torch.get_num_threads(), env_vars={"HOST": name}, **quiet)
    ray.init(address=own.address, log_to_driver=False, logging_level="error")
    yield own
    ray.shutdown()
    own.shutdown()
    del os.environ["RAY_AUTH_MODE"]


@dataclass(frozen=True)
class OnHosts(ShippedModel):
    """The pocket model, on hosts whose working folder is of their own; some lack the model."""

    folder: str = ""
    lacking: tuple[str, ...] = ()

    def load(self, encode: Any = None) -> tuple[Any, str]:
        host = os.environ["HOST"]
        Path(self.folder, f"loaded-{host}").touch()
        if host in self.lacking:
            raise CheckpointError("There is no model here.", fix="Copy it.")
        if (Path(self.folder) / host).exists():
            os.chdir(Path(self.folder) / host)
        while not all(Path(self.folder, f"loaded-{name}").exists() for name in ("good", "bad")):
            time.sleep(0.05)  # so that each host gets its share
        pipeline, where = super().load(encode)
        return pipeline, where


def planned(folder: Path, *, count: int, image: Path, output: Path) -> list[PlannedVideo]:
    rows = [{"image": str(image), "seed": seed} for seed in range(count)]
    return plan(read_manifest(write_manifest(folder, rows), defaults=FAST), output, fingerprint={})


def run(model: Any, videos: list[PlannedVideo], **options: Any) -> tuple[BatchReport, list[str]]:
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        report = run_on_ray(model, ExpertChoice(), videos, BatchOptions(), **options)
    return report, [str(one.message) for one in seen if "gives up the host" in str(one.message)]


@pytest.fixture
def photo_of(tmp_path: Path) -> Path:
    photo(24).save(tmp_path / "photo.png")
    return tmp_path / "photo.png"


def test_a_host_that_lacks_the_model_is_named_and_the_others_go_on(
    cluster: Any, tmp_path: Path, photo_of: Path
) -> None:
    videos = planned(tmp_path, count=3, image=photo_of, output=tmp_path / "videos")
    model = OnHosts(folder=str(tmp_path), lacking=("bad",))
    report, (warning,) = run(model, videos)
    assert (len(report.done), report.failures) == (3, ())
    assert "could not load the model. There is no model here." in warning
    assert any(node["NodeID"][:12] in warning for node in ray.nodes())

    model = OnHosts(folder=str(tmp_path), lacking=("bad", "good"))
    with pytest.raises(CheckpointError, match=r"no model here\. \(on .*Ray node"):
        run(model, videos)


@pytest.mark.skipif(not Path("/proc/self/cwd").exists(), reason="Linux has it")
def test_videos_for_which_a_host_lacks_images_are_made_elsewhere(
    cluster: Any, tmp_path: Path, photo_of: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for host in ("good", "bad"):
        (tmp_path / host).mkdir()
    shutil.copy(photo_of, tmp_path / "good")
    monkeypatch.chdir(tmp_path)
    image = Path("/proc/self/cwd/photo.png")
    videos = planned(tmp_path, count=8, image=image, output=tmp_path / "videos")
    report, given_up = run(OnHosts(folder=str(tmp_path)), videos)
    assert (len(report.done), report.failures) == (8, ())
    assert len(given_up) == 1 and "Cannot read the image" in given_up[0]


@pytest.mark.skipif(not Path("/proc/self/cwd").exists(), reason="Linux has it")
def test_a_folder_that_no_host_shares_ends_the_batch_before_its_videos_are_made(
    cluster: Any, tmp_path: Path, photo_of: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for host in ("good", "bad"):
        (tmp_path / host).mkdir()
    monkeypatch.chdir(tmp_path)
    output = Path("/proc/self/cwd/videos")
    videos = planned(tmp_path, count=9, image=photo_of, output=output)
    with pytest.raises(ConfigError, match=r"No host .* is left.*Ray node .*no output folder"):
        run(OnHosts(folder=str(tmp_path)), videos)
    assert not list(tmp_path.rglob("*.mp4"))


def test_a_host_that_joins_is_used_and_a_lost_one_costs_nothing(
    cluster: Any, tmp_path: Path, photo_of: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray_driver, "_SECONDS_BETWEEN_LOOKS", 0.2)
    videos = planned(tmp_path, count=6, image=photo_of, output=tmp_path / "videos")
    threads, is_at_work = torch.get_num_threads(), tmp_path / "new-is-at-work"
    newcomers: list[Any] = []

    def join_and_be_lost(progress: Any) -> None:
        if not newcomers:
            newcomers.append(cluster.add_node(num_cpus=threads, env_vars={"HOST": "new"}))
        elif is_at_work.exists() and len(newcomers) == 1:
            newcomers.append(None)
            cluster.remove_node(newcomers[0], allow_graceful=False)

    class Patient(OnHosts):
        """After a video each, the first hosts wait until the new one makes one without end."""

        def load(self, encode: Any = None) -> tuple[Any, str]:
            pipeline, where = super().load(encode)
            start, made = type(pipeline).__call__, []

            def call(pipeline: Any, *arguments: Any, **options: Any) -> Any:
                if os.environ["HOST"] == "new":
                    is_at_work.touch()
                    time.sleep(600)
                while made and not is_at_work.exists():
                    time.sleep(0.05)
                made.append(1)
                return start(pipeline, *arguments, **options)

            pipeline.__class__ = type("PocketPipeline", (type(pipeline),), {"__call__": call})
            return pipeline, where

    tally = Tally(len(videos), on_progress=join_and_be_lost)
    report, _ = run(Patient(folder=str(tmp_path)), videos, tally=tally)
    assert len(newcomers) == 2
    assert (len(report.done), len(set(report.done)), report.failures) == (6, 6, ())


def test_a_second_batch_makes_nothing_that_the_first_has_made(
    cluster: Any, tmp_path: Path, photo_of: Path
) -> None:
    videos = planned(tmp_path, count=4, image=photo_of, output=tmp_path / "videos")
    pipeline, _ = ShippedModel().load()
    pipeline.set_progress_bar_config(disable=True)
    run_batch(pipeline, videos[1:])
    videos[3].path.write_bytes(b"")  # damaged
    times = [video.path.stat().st_mtime_ns for video in videos[1:3]]
    report, _ = run(ShippedModel(), videos, num_workers=1)
    assert set(report.done) == {videos[0].path.name, videos[3].path.name}
    assert set(report.found) == {video.path.name for video in videos[1:3]}
    assert [video.path.stat().st_mtime_ns for video in videos[1:3]] == times
    assert run_batch(pipeline, videos[:1]).found == (videos[0].path.name,)
