"""`motionmerge batch --ray`: workers are killed, and every video is there once, the same bytes."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from motionmerge.cli import app
from motionmerge.errors import ConfigError
from motionmerge.models.pocket.components import weights_path
from motionmerge.sampling.batch import ray_driver
from motionmerge.sampling.batch.batch import BatchOptions, BatchProgress, Tally, missing, run_batch
from motionmerge.sampling.batch.manifest import PlannedVideo, plan, read_manifest
from motionmerge.sampling.batch.ray_batch import run_on_ray
from motionmerge.sampling.batch.ray_worker import with_absolute_paths
from motionmerge.sampling.request.experts import ExpertChoice, from_recipe
from motionmerge.sampling.request.folder import find_pipeline
from motionmerge.sampling.request.model import FolderModel, ShippedModel
from motionmerge.sampling.videos.make_video import VideoSettings

from ..tiny.folders import save_tiny
from ..tiny.pipelines import photo
from .test_batch import write_manifest

ray = pytest.importorskip("ray", reason="Ray is not installed: pip install 'motionmerge[ray]'")

pytestmark = pytest.mark.slow

EXPERTS = from_recipe("pocket")
FAST = VideoSettings(prompt="the camera pans left", height=64, width=64, num_inference_steps=2)


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    """A cluster on this machine with a place for two workers, however many cores there are."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    os.environ.update(RAY_worker_niceness="0")  # by default workers yield to all other processes
    ray.init(
        address="local",
        num_cpus=2 * torch.get_num_threads(),
        include_dashboard=False,
        object_store_memory=100_000_000,
        log_to_driver=False,
        logging_level="error",
    )
    yield
    ray.shutdown()


def planned(folder: Path, output: Path, seeds: range) -> list[PlannedVideo]:
    photo(24).save(folder / "photo.png")
    rows = [{"image": "photo.png", "seed": seed} for seed in seeds]
    return plan(read_manifest(write_manifest(folder, rows), defaults=FAST), output, fingerprint={})


def model_that_kills(folder: Path, *, seeds: list[int]) -> Any:
    """The pocket model, except that its process is killed while it makes certain videos.

    A seed that is listed twice kills two processes; a file in the folder is one kill to come.
    """

    @dataclass(frozen=True)
    class Deadly(ShippedModel):
        bombs: str = str(folder)

        def load(self) -> tuple[Any, str]:
            pipeline, where = super().load()
            start = type(pipeline).__call__

            def explode(pipeline: Any, *arguments: Any, **options: Any) -> Any:
                seed = options["generator"].initial_seed()
                for bomb in sorted(Path(self.bombs).glob(f"seed{seed}-*")):
                    bomb.unlink()
                    os.kill(os.getpid(), signal.SIGKILL)
                return start(pipeline, *arguments, **options)

            pipeline.__class__ = type("Pipeline", (type(pipeline),), {"__call__": explode})
            pipeline.__class__.__name__ = "PocketPipeline"
            return pipeline, where

    for number, seed in enumerate(seeds):
        (folder / f"seed{seed}-{number}").touch()
    return Deadly()


def test_nothing_is_lost_or_made_twice_when_workers_are_killed(
    cluster: None, tmp_path: Path
) -> None:
    alone = planned(tmp_path, tmp_path / "alone", range(8))
    pipeline, _ = ShippedModel().load()
    pipeline.set_progress_bar_config(disable=True)
    with EXPERTS.attach(pipeline) as bank:
        assert len(run_batch(pipeline, alone, bank=bank).done) == 8

        (tmp_path / "bombs").mkdir()
        model = model_that_kills(tmp_path / "bombs", seeds=[5, 5])
        videos = planned(tmp_path, tmp_path / "shared", range(8))
        seen: list[BatchProgress] = []
        tally = Tally(8, failure_list=tmp_path / "failures.jsonl", on_progress=seen.append)
        options = BatchOptions(videos_per_switch=2, retries=0)
        report = run_on_ray(model, EXPERTS, videos, options, num_workers=2, tally=tally)

        # The first death takes a neighbour along, which is made by another worker; at the second
        # the video is alone, and is given up.
        (failure,) = report.failures
        assert (failure.seed, failure.attempts) == (5, 1)
        assert "worker died" in failure.error
        made = [video.path.name for video in videos if video.job.settings.seed != 5]
        assert Counter(report.done) == Counter(made)
        assert [now.done + now.failed for now in seen] == list(range(1, 9))
        assert [video.job.settings.seed for video in missing(videos)] == [5]
        assert len(run_batch(pipeline, missing(videos), bank=bank).done) == 1
    for one, other in zip(alone, videos, strict=True):
        assert other.path.read_bytes() == one.path.read_bytes()


def test_the_flag_makes_what_is_missing_and_reports_as_without(
    cluster: None, tmp_path: Path
) -> None:
    photo(24).save(tmp_path / "photo.png")
    rows = [{"image": "photo.png", "prompt": "the camera pans left", "seed": s} for s in range(2)]
    command = ["batch", str(write_manifest(tmp_path, rows)), "-o", str(tmp_path / "videos")]
    command += ["--size", "64", "--steps", "2", "--json"]
    report = json.loads(CliRunner().invoke(app, [*command, "--ray", "--workers", "1"]).stdout)
    assert (len(report["done"]), report["skipped"], report["failures"]) == (2, 0, [])
    again = json.loads(CliRunner().invoke(app, command).stdout)
    assert (again["done"], again["skipped"]) == ([], 2)
    for flags, environment, words in (
        (["--workers", "2"], {}, "--workers is for --ray"),
        (["--ray"], {"RANK": "0", "WORLD_SIZE": "2"}, "share the videos already"),
    ):
        result = CliRunner().invoke(app, [*command, *flags], env=environment)
        assert result.exit_code == 2 and words in result.output


@pytest.mark.skipif(not Path("/proc/self/cwd").exists(), reason="Linux has it")
def test_relative_paths_are_those_of_the_driver_and_a_video_elsewhere_is_a_failure(
    cluster: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    @dataclass(frozen=True)
    class OnAnotherMachine(ShippedModel):
        folder: str = str(tmp_path / "machine")

        def load(self, encode: Any = None) -> tuple[Any, str]:
            os.chdir(self.folder)
            return super().load(encode)

    (tmp_path / "machine/videos").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(ray_driver, "_SECONDS_UNTIL_A_WARNING", 1)
    shutil.copy(weights_path("tuned"), "own.safetensors")
    not_shared = Path("/proc/self/cwd/videos")  # in each process another one
    videos = planned(Path(), Path("videos"), range(1)) + planned(Path(), not_shared, range(1, 2))
    model = OnAnotherMachine("own.safetensors")
    with all_places_taken(seconds=3), pytest.warns(UserWarning, match="0 CPU were free"):
        report = run_on_ray(model, ExpertChoice(), videos, BatchOptions(), num_workers=1)
    assert report.done == (videos[0].path.name,) and videos[0].path.exists()
    (failure,) = report.failures
    assert (failure.seed, failure.attempts) == (1, 1)
    assert "not the same on all machines" in failure.error
    assert (tmp_path / "machine/videos" / failure.output).exists()


@contextmanager
def all_places_taken(*, seconds: float) -> Iterator[None]:
    """Let something else use the whole cluster for a while."""

    def wait() -> None:
        time.sleep(seconds)

    task = ray.remote(num_cpus=2 * torch.get_num_threads())(wait).remote()
    while ray.available_resources().get("CPU", 0):
        time.sleep(0.1)
    yield
    ray.get(task)


def test_all_paths_of_a_folder_become_absolute(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_tiny("SVD", tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    model, _, _ = with_absolute_paths(
        FolderModel(folder=find_pipeline("model")), ExpertChoice(), []
    )
    assert isinstance(model, FolderModel)
    files = [file for own in model.folder.weights.values() for file in own]
    assert files and model.folder.others
    for path in (model.path, *files, *model.folder.others):
        assert path.is_absolute() and path.exists()


def test_a_video_survives_that_idle_workers_died_with_the_one_that_made_it(
    cluster: None, tmp_path: Path
) -> None:
    @dataclass(frozen=True)
    class OnOneMachine(ShippedModel):
        """At the second video its machine is lost, once: this worker and the idle one."""

        folder: str = str(tmp_path)

        def load(self, encode: Any = None) -> tuple[Any, str]:
            pipeline, where = super().load(encode)
            folder, start = Path(self.folder), type(pipeline).__call__
            (folder / f"process-{os.getpid()}").touch()

            def call(pipeline: Any, *arguments: Any, **options: Any) -> Any:
                if options["generator"].initial_seed() == 1 and not (folder / "lost").exists():
                    while not list(folder.glob("videos/*-seed0-*.mp4")):
                        time.sleep(0.1)
                    time.sleep(1)  # now the other one is idle
                    (folder / "lost").touch()
                    own = folder / f"process-{os.getpid()}"
                    for process in sorted(folder.glob("process-*"), key=lambda path: path == own):
                        os.kill(int(process.name.removeprefix("process-")), signal.SIGKILL)
                return start(pipeline, *arguments, **options)

            pipeline.__class__ = type("PocketPipeline", (type(pipeline),), {"__call__": call})
            return pipeline, where

    videos = planned(tmp_path, tmp_path / "videos", range(2))
    options = BatchOptions(videos_per_switch=1, retries=1)
    report = run_on_ray(OnOneMachine(), EXPERTS, videos, options, num_workers=2)
    assert (len(report.done), report.failures) == (2, ())
    assert len(list(tmp_path.glob("process-*"))) == 3


def test_a_worker_for_which_no_machine_has_room_is_refused(cluster: None, tmp_path: Path) -> None:
    class OnGpu(ShippedModel):
        @property
        def device(self) -> torch.device:
            return torch.device("cuda")

    videos = planned(tmp_path, tmp_path / "videos", range(1))
    with pytest.raises(ConfigError, match=r"takes 1 GPU and 1 CPU; .* 0 GPU .*\n.*device='cpu'"):
        run_on_ray(OnGpu(), EXPERTS, videos, BatchOptions(), num_workers=1)
    before = torch.get_num_threads()
    torch.set_num_threads(2 * before + 1)
    try:
        with pytest.raises(ConfigError, match=f"OMP_NUM_THREADS={2 * before},"):
            run_on_ray(ShippedModel(), EXPERTS, videos, BatchOptions(), num_workers=1)
    finally:
        torch.set_num_threads(before)


def test_a_cluster_that_wants_a_token_is_no_cluster_to_start_anew(cluster: None) -> None:
    address = ray.get_runtime_context().gcs_address
    code = "from motionmerge.sampling.batch import ray_cluster; ray_cluster.cluster_device()"
    environment = {**os.environ, "RAY_ADDRESS": address, "RAY_AUTH_MODE": "disabled"}
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 1
    assert f"ConfigError: The Ray cluster of RAY_ADDRESS={address}" in result.stderr
    assert "start the driver on a node" in result.stderr
    assert "RAY_AUTH_MODE=token" in result.stderr


def test_a_cluster_that_has_no_memory_for_the_model_is_reported(tmp_path: Path) -> None:
    limits = {"RAY_memory_usage_threshold": "0.001", "RAY_memory_monitor_refresh_ms": "100"}
    result = batch_in_a_process(tmp_path, RAY_ADDRESS="local", **limits)
    assert result.returncode == 2
    assert "before the model is loaded" in result.stderr and "low on memory" in result.stderr


def batch_in_a_process(folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    photo(24).save(folder / "photo.png")
    manifest = write_manifest(folder, [{"image": "photo.png", "prompt": "the camera pans left"}])
    command = [sys.executable, "-m", "motionmerge.cli", "batch", str(manifest), "-o", str(folder)]
    command += ["--size", "64", "--steps", "2", "--ray", "--workers", "1", "--retries", "0"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
