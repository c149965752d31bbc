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
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from motionmerge.cli import app
from motionmerge.errors import CheckpointError, ConfigError
from motionmerge.evaluation.sweeps.videos import VideoBench
from motionmerge.models.pocket.components import weights_path
from motionmerge.sampling.batch import ray_driver
from motionmerge.sampling.batch.batch import BatchOptions, BatchProgress, Tally, run_batch
from motionmerge.sampling.batch.manifest import PlannedVideo, plan, read_manifest
from motionmerge.sampling.batch.ray_batch import RayVariantMaker, run_on_ray
from motionmerge.sampling.batch.ray_worker import with_absolute_paths
from motionmerge.sampling.batch.variants import Variant, VariantMaker
from motionmerge.sampling.request.experts import ExpertChoice, from_recipe
from motionmerge.sampling.request.folder import find_pipeline
from motionmerge.sampling.request.model import FolderModel, ShippedModel
from motionmerge.sampling.videos.settings import VideoSettings

from ..tiny.folders import save_tiny
from ..tiny.pipelines import photo
from .test_batch import write_manifest

ray = pytest.importorskip("ray", reason="Ray is not installed: pip install 'motionmerge[ray]'")

pytestmark = pytest.mark.slow

# So that no worker imports the tests.
ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])

EXPERTS = from_recipe("pocket")
FAST = VideoSettings(prompt="the camera pans left", height=64, width=64, num_inference_steps=2)


def planned(folder: Path, output: Path, seeds: range) -> list[PlannedVideo]:
    photo(24).save(folder / "photo.png")
    rows = [{"image": "photo.png", "seed": seed} for seed in seeds]
    return plan(read_manifest(write_manifest(folder, rows), defaults=FAST), output, fingerprint={})


@dataclass(frozen=True)
class Deadly(ShippedModel):
    """The pocket model, whose process is killed at seed 3, twice.

    The first time that this video is begun, it takes along the video that shares its switch of
    experts. The second time, all others have been made, and the worker that is idle dies as well.
    """

    folder: str = ""

    def load(self, encode: Any = None) -> tuple[Any, str]:
        pipeline, where = super().load(encode)
        folder, start = Path(self.folder), type(pipeline).__call__
        own = folder / f"process-{os.getpid()}"
        own.touch()

        def call(pipeline: Any, *arguments: Any, **options: Any) -> Any:
            deaths = len(list(folder.glob("died-*")))
            if options["generator"].initial_seed() == 3 and deaths < 2:
                while deaths == 1 and len(list(folder.glob("shared/*.mp4"))) < 5:
                    time.sleep(0.05)
                time.sleep(deaths)  # the other worker has told that it is done
                processes = {own} if deaths == 0 else set(folder.glob("process-*"))
                (folder / f"died-{deaths}").touch()
                for process in sorted(processes, key=lambda path: path == own):
                    process.rename(folder / process.name.replace("process", "killed"))
                    os.kill(int(process.name.removeprefix("process-")), signal.SIGKILL)
            return start(pipeline, *arguments, **options)

        pipeline.__class__ = type("PocketPipeline", (type(pipeline),), {"__call__": call})
        return pipeline, where


def test_nothing_is_lost_or_made_twice_when_workers_are_killed(
    add_host: Callable[..., Any], tmp_path: Path
) -> None:
    add_host("second")
    alone = planned(tmp_path, tmp_path / "alone", range(6))
    pipeline, _ = ShippedModel().load()
    pipeline.set_progress_bar_config(disable=True)
    with EXPERTS.attach(pipeline) as bank:
        assert len(run_batch(pipeline, alone, bank=bank).done) == 6

    videos = planned(tmp_path, tmp_path / "shared", range(6))
    seen: list[BatchProgress] = []
    report = run_on_ray(
        Deadly(folder=str(tmp_path)),
        EXPERTS,
        videos,
        BatchOptions(videos_per_switch=2, retries=2),
        num_workers=2,
        tally=Tally(6, on_progress=seen.append),
    )
    # A host's first video is made alone, so that both deaths may count; those of idle workers never
    # do (which deaths count is tested exactly with the queue).
    # A worker that is lost after it wrote a video and before it told is one whose video is found.
    made = Counter((*report.done, *report.found))
    assert made == Counter(video.path.name for video in videos)
    assert report.failures == ()
    assert [now.done + now.found + now.failed for now in seen] == list(range(1, 7))
    assert len(list(tmp_path.glob("died-*"))) == 2
    assert len(list(tmp_path.glob("killed-*"))) == 3 and len(list(tmp_path.glob("process-*"))) == 1
    for one, other in zip(alone, videos, strict=True):
        assert other.path.read_bytes() == one.path.read_bytes()


def test_the_flag_makes_what_is_missing_from_relative_paths_and_reports_as_without(
    ray_cluster: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # where the processes of the cluster are not
    monkeypatch.setattr(ray_driver, "_SECONDS_UNTIL_A_WARNING", 1)
    photo(24).save("photo.png")
    shutil.copy(weights_path("tuned"), "own.safetensors")
    Path("own.yaml").write_text("inputs: {own: own.safetensors}\nexperts: {only: own}\n")
    rows = [{"image": "photo.png", "prompt": "the camera pans left", "seed": s} for s in range(2)]
    command = ["batch", write_manifest(Path(), rows).name, "-o", "videos", "--recipe", "own.yaml"]
    command += ["--size", "64", "--steps", "2", "--json"]
    with all_places_taken(seconds=2), pytest.warns(UserWarning, match="0 CPU were free"):
        result = CliRunner().invoke(app, [*command, "--ray", "--workers", "1"])
    report = json.loads(result.stdout)
    assert (len(report["done"]), report["skipped"], report["failures"]) == (2, 0, [])
    again = json.loads(CliRunner().invoke(app, command).stdout)
    assert (again["done"], again["skipped"]) == ([], 2)


def test_a_bench_on_the_cluster_measures_what_one_in_this_process_does(
    ray_cluster: Any, tmp_path: Path
) -> None:
    photo(24).save(tmp_path / "photo.png")
    manifest = write_manifest(tmp_path, [{"image": "photo.png", "id": "one"}])
    model = ShippedModel()
    (job,) = read_manifest(manifest, defaults=FAST)
    jobs = [replace(job, settings=job.settings.resolved(model.family, model.limits))]
    found = []
    for maker in (
        RayVariantMaker(model, tmp_path / "there", num_workers=1),
        VariantMaker(model, tmp_path / "here"),
    ):
        bench = VideoBench(maker, jobs, maker.folder)
        found.append(bench.observe(Variant("as it was", EXPERTS), num_clips=1, num_steps=2))
        assert ("pipeline" in vars(maker)) == (maker.folder.name == "here")
    there, here = (sorted((tmp_path / name).glob("*.mp4")) for name in ("there", "here"))
    assert [one.name for one in there] == [one.name for one in here] and len(here) == 1
    assert there[0].read_bytes() == here[0].read_bytes()
    assert found[0].values == found[1].values
    row = json.loads((tmp_path / "there" / "timings.jsonl").read_text())
    assert (row["kind"], row["loads"]) == ("pocket on 1 workers", 1)
    assert 0 < row["seconds"] < row["loading"], "starting a worker is not what videos take"


@pytest.mark.parametrize(
    ("flags", "environment", "words"),
    [
        (["--workers", "2"], {}, "--workers is for --ray"),
        (["--ray"], {"RANK": "0", "WORLD_SIZE": "2"}, "share the videos already"),
    ],
)
def test_flags_that_share_the_videos_in_two_ways_are_refused(
    tmp_path: Path, flags: list[str], environment: dict[str, str], words: str
) -> None:
    command = ["batch", str(write_manifest(tmp_path, [])), "-o", str(tmp_path), *flags]
    result = CliRunner().invoke(app, command, env=environment)
    assert result.exit_code == 2 and words in result.output


@contextmanager
def all_places_taken(*, seconds: float) -> Iterator[None]:
    """Let something else use the whole cluster for a while."""

    def wait() -> None:
        time.sleep(seconds)

    task = ray.remote(num_cpus=torch.get_num_threads())(wait).remote()
    while ray.available_resources().get("CPU", 0):
        time.sleep(0.1)
    yield
    ray.get(task)


def test_all_paths_of_a_model_become_absolute(
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
    for weights, absolute in (("own.pt", str(tmp_path / "own.pt")), ("tuned", "tuned")):
        shipped, _, _ = with_absolute_paths(ShippedModel(weights), ExpertChoice(), [])
        assert isinstance(shipped, ShippedModel) and shipped.weights == absolute


def test_a_model_that_no_host_can_load_ends_the_batch_and_names_the_host(
    ray_cluster: Any, tmp_path: Path
) -> None:
    class Lacking(ShippedModel):
        def load(self, encode: Any = None) -> tuple[Any, str]:
            raise CheckpointError("There is no model here.", fix="Copy it.")

    videos = planned(tmp_path, tmp_path / "videos", range(1))
    with (
        pytest.warns(UserWarning, match="gives up the host"),
        pytest.raises(CheckpointError, match=r"no model here\. \(on .*Ray node") as caught,
    ):
        run_on_ray(Lacking(), ExpertChoice(), videos, BatchOptions())
    assert caught.value.fix == "Copy it."


def test_a_worker_for_which_no_machine_has_room_is_refused(
    ray_cluster: Any, tmp_path: Path
) -> None:
    class OnGpu(ShippedModel):
        @property
        def device(self) -> torch.device:
            return torch.device("cuda")

    videos = planned(tmp_path, tmp_path / "videos", range(1))
    with pytest.raises(ConfigError, match=r"takes 1 GPU and 1 CPU; .* 0 GPU .*\n.*device='cpu'"):
        run_on_ray(OnGpu(), EXPERTS, videos, BatchOptions(), num_workers=1)
    largest = torch.get_num_threads()
    with (
        num_threads(largest + 1),
        pytest.raises(ConfigError, match=f"OMP_NUM_THREADS={largest},"),
    ):
        run_on_ray(ShippedModel(), EXPERTS, videos, BatchOptions(), num_workers=1)


@contextmanager
def num_threads(number: int) -> Iterator[None]:
    """Let torch use so many threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def test_a_host_that_has_no_memory_for_the_model_is_reported(
    ray_cluster: Any, add_host: Callable[..., Any], tmp_path: Path
) -> None:
    limits = {"RAY_memory_usage_threshold": "0.001", "RAY_memory_monitor_refresh_ms": "100"}
    with num_threads(torch.get_num_threads() + 1):  # there is room on the new host alone
        add_host("small", num_cpus=torch.get_num_threads(), **limits)
        videos = planned(tmp_path, tmp_path / "videos", range(1))
        with pytest.raises(ConfigError, match=r"before the model is loaded.*low on memory"):
            run_on_ray(ShippedModel(), ExpertChoice(), videos, BatchOptions(retries=0))


def test_a_cluster_that_cannot_be_joined_is_not_started_anew(ray_cluster: Any) -> None:
    code = """
import os, sys
from motionmerge.errors import ConfigError
from motionmerge.sampling.batch.ray_cluster import cluster_device
for os.environ["RAY_ADDRESS"] in sys.argv[1:]:
    try:
        cluster_device()
    except ConfigError as error:
        print(error)
"""
    environment = {**os.environ, "RAY_AUTH_MODE": "disabled"}
    command = [sys.executable, "-c", code, "no-port", ray_cluster.address]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    nowhere, no_token = result.stdout.split("The Ray cluster of RAY_ADDRESS=")[1:]
    assert nowhere.startswith("no-port cannot be joined") and "See that it is up" in nowhere
    assert no_token.startswith(f"{ray_cluster.address} cannot be joined")
    assert "start the driver on a node" in no_token and "RAY_AUTH_MODE=token" in no_token
