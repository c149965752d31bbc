"""`motionmerge batch --ray`: workers are killed, and every video is there once, the same bytes."""

from __future__ import annotations

import json
import os
import signal
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from motionmerge.cli import app
from motionmerge.errors import CheckpointError
from motionmerge.sampling.batch import BatchOptions, Progress, Tally, missing, run_batch
from motionmerge.sampling.expert_choice import from_recipe
from motionmerge.sampling.make_video import VideoSettings
from motionmerge.sampling.manifest import PlannedVideo, plan, read_manifest
from motionmerge.sampling.model_choice import ShippedModel
from motionmerge.sampling.ray_batch import run_on_ray

from .test_batch import write_manifest
from .tiny_pipelines import photo

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
        seen: list[Progress] = []
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
    report = json.loads(CliRunner().invoke(app, [*command, "--ray"]).stdout)
    assert (len(report["done"]), report["skipped"], report["failures"]) == (2, 0, [])
    again = json.loads(CliRunner().invoke(app, command).stdout)
    assert (again["done"], again["skipped"]) == ([], 2)
    for flags, environment, words in (
        (["--workers", "2"], {}, "--workers is for --ray"),
        (["--ray"], {"RANK": "0", "WORLD_SIZE": "2"}, "share the videos already"),
    ):
        result = CliRunner().invoke(app, [*command, *flags], env=environment)
        assert result.exit_code == 2 and words in result.output


def test_errors_of_the_user_come_back_from_a_worker(cluster: None, tmp_path: Path) -> None:
    videos = planned(tmp_path, tmp_path, range(1))
    with pytest.raises(CheckpointError, match="'none'"):
        run_on_ray(ShippedModel("none"), EXPERTS, videos, BatchOptions(), num_workers=1)
