"""What the driver of a cluster decides about videos and hosts, without a cluster."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from motionmerge.errors import ConfigError
from motionmerge.io.video import write_video
from motionmerge.sampling.batch.batch import (
    CONFIGURATION_KEY,
    BatchProgress,
    BatchReport,
    Failure,
    Tally,
)
from motionmerge.sampling.batch.manifest import PlannedVideo, plan, read_manifest
from motionmerge.sampling.batch.ray_driver import RayDriver
from motionmerge.sampling.batch.ray_hosts import Hosts, lack_of
from motionmerge.sampling.batch.ray_queue import VideoQueue
from motionmerge.sampling.videos.settings import VideoSettings

from ..tiny.pipelines import photo
from .test_batch import write_manifest

ONE_CPU = {"CPU": 1}
NOTHING = BatchReport(done=(), failures=(), seconds=0.0)


def nodes(*names: str) -> list[dict[str, Any]]:
    """What `ray.nodes` lists, with a place for one worker on each."""
    return [
        {
            "NodeID": name,
            "Alive": True,
            "Resources": {"CPU": 1.0},
            "NodeManagerHostname": f"host-{name}",
            "NodeManagerAddress": "10.0.0.1",
        }
        for name in names
    ]


class Case:
    """A queue of videos that none has made, for hosts of these names."""

    def __init__(self, folder: Path, *names: str, count: int = 1, retries: int = 1) -> None:
        photo(24).save(folder / "photo.png")
        rows = [{"image": "photo.png", "seed": seed, "prompt": "a cat"} for seed in range(count)]
        jobs = read_manifest(write_manifest(folder, rows), defaults=VideoSettings())
        (folder / "out").mkdir()
        self.videos = plan(jobs, folder / "out", fingerprint={})
        self.nodes = nodes(*names)
        self.hosts = Hosts(lambda: self.nodes, ONE_CPU)
        self.list = folder / "failures.jsonl"
        self.seen: list[BatchProgress] = []
        tally = Tally(count, failure_list=self.list, on_progress=self.seen.append)
        self.queue = VideoQueue(self.videos, hosts=self.hosts, retries=retries, tally=tally)

    def take(self, node: str, size: int = 1) -> list[PlannedVideo]:
        return self.queue.take(node, size)

    def lacks(self, node: str, reason: str = "Cannot read the image.") -> list[PlannedVideo]:
        """Let a worker take the next video and find that its host lacks a file for it."""
        videos = self.take(node)
        lacks = {video.path.name: reason for video in videos}
        self.queue.receive(videos, NOTHING, lacks, node=node)
        return videos

    def makes(self, node: str) -> list[PlannedVideo]:
        """Let a worker take the next video and make it."""
        videos = self.take(node)
        make(videos)
        self.queue.receive(videos, report_of(videos), {}, node=node)
        return videos

    def driver(self, num_workers: int | None = None) -> RayDriver:
        """A driver without a cluster: it may decide, but start nothing."""
        return RayDriver(
            ray=None,
            new_worker=None,
            hosts=self.hosts,
            needs=ONE_CPU,
            free=ONE_CPU,
            queue=self.queue,
            num_workers=num_workers,
        )

    def failures(self) -> tuple[Failure, ...]:
        return self.queue.tally.report().failures


@pytest.fixture
def case(tmp_path: Path) -> Callable[..., Case]:
    return lambda *names, **options: Case(tmp_path, *names, **options)


@pytest.fixture
def given_up() -> Iterator[list[Any]]:
    """Warnings that a host gets no more workers."""
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        yield seen


def make(videos: Sequence[PlannedVideo]) -> None:
    for video in videos:
        about = {CONFIGURATION_KEY: video.configuration}
        write_video(video.path, torch.zeros(1, 3, 16, 16), metadata=about)


def report_of(videos: Sequence[PlannedVideo]) -> BatchReport:
    return BatchReport(tuple(video.path.name for video in videos), (), 0.0)


def lines(path: Path) -> list[Mapping[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_video_for_which_a_host_lacks_a_file_is_tried_once_on_another(
    case: Callable[..., Case],
) -> None:
    one = case("bad", "good")
    assert one.lacks("bad") == one.videos
    assert one.take("bad") == []
    assert one.makes("good") == one.videos
    assert (one.failures(), one.queue.lacked) == ((), {})


def test_a_video_that_two_hosts_lack_files_for_is_listed_with_both_of_them(
    case: Callable[..., Case],
) -> None:
    one = case("bad", "worse")
    one.lacks("bad", "There is no output folder.")
    one.lacks("worse")
    (line,) = lines(one.list)
    assert line["host"] == "host-worse (10.0.0.1, Ray node worse)" and line["attempts"] == 2
    assert line["error"] == (
        "Cannot read the image. (on host-worse (10.0.0.1, Ray node worse)) Before, on another "
        "host: There is no output folder. (on host-bad (10.0.0.1, Ray node bad))"
    )
    assert not one.queue.waiting


def test_a_video_for_which_this_machine_lacks_a_file_too_is_not_tried_again(
    case: Callable[..., Case], tmp_path: Path, given_up: list[Any]
) -> None:
    one = case("a", "b", count=4)
    (tmp_path / "photo.png").unlink()
    for _ in range(4):
        one.lacks("a")
    assert [failure.attempts for failure in one.failures()] == [1] * 4
    assert not given_up and not one.hosts.is_useless("a")  # no fault of the host


def test_a_worker_sees_what_its_host_lacks_before_it_makes_a_video(
    case: Callable[..., Case], tmp_path: Path
) -> None:
    (video,) = case("a").videos
    assert lack_of(video) is None
    (tmp_path / "photo.png").unlink()
    assert "Cannot read the image" in (lack_of(video) or "")
    (tmp_path / "out").rmdir()
    assert "There is no output folder" in (lack_of(video) or "")


def test_a_video_that_is_not_here_once_made_is_tried_on_another_host(
    case: Callable[..., Case],
) -> None:
    one = case("bad", "good")
    videos = one.take("bad")
    one.queue.receive(videos, report_of(videos), {}, node="bad")
    assert one.take("bad") == [] and one.take("good") == videos
    one.queue.receive(videos, report_of(videos), {}, node="good")
    (failure,) = one.failures()
    assert "the folder is not the same on all machines. (on host-good" in failure.error
    assert "Before, on another host" in failure.error and "(on host-bad" in failure.error


def test_a_host_that_lacks_files_three_times_in_a_row_does_not_drain_the_queue(
    case: Callable[..., Case], given_up: list[Any]
) -> None:
    one = case("bad", "good", count=9)
    assert not one.hosts.has_made("bad")  # so it gets one video at a time
    for _ in range(2):
        one.lacks("bad")
    one.makes("bad")
    assert one.hosts.has_made("bad")
    for _ in range(2):
        one.lacks("bad")
    assert not one.hosts.is_useless("bad")
    one.lacks("bad")
    assert one.hosts.is_useless("bad") and one.hosts.num_places() == 1
    (warning,) = given_up
    assert "gives up the host host-bad (10.0.0.1, Ray node bad): 3 videos in" in str(
        warning.message
    )
    for _ in range(8):
        assert one.makes("good")
    assert (one.failures(), len(one.queue.waiting)) == ((), 0)


def test_a_video_that_no_other_host_can_try_fails_at_once(
    case: Callable[..., Case], given_up: list[Any]
) -> None:
    one = case("bad", "small", "lost", "closed", count=2)
    one.nodes[1]["Resources"] = {"CPU": 0.5}
    one.lacks("bad")
    assert not one.failures()
    one.nodes[2]["Alive"] = False
    one.hosts.close("closed", "it could not load the model.", fix="Copy it.")
    one.lacks("bad")
    assert [failure.attempts for failure in one.failures()] == [1]
    one.queue.fail_the_lacking()  # of the first, now that there is no other either
    assert [failure.attempts for failure in one.failures()] == [1, 1]
    assert len(given_up) == 1


def test_the_batch_ends_with_a_name_and_a_fix_when_every_host_was_given_up(
    case: Callable[..., Case], given_up: list[Any]
) -> None:
    one = case("a", "b", count=9)
    for node in ("a", "b"):
        for _ in range(3):
            one.lacks(node, "There is no output folder.")
    with pytest.raises(ConfigError, match=r"No host .* left\..*host-b .*no output") as caught:
        one.driver().run()
    assert "the same command goes on" in (caught.value.fix or "")
    assert len(given_up) == 2
    assert len(one.failures()) == 6  # nobody has tried the other three
    assert {failure.host for failure in one.failures()} == set(map(one.hosts.name, "ab"))


def test_a_host_that_loaded_the_model_and_was_lost_may_come_back(
    case: Callable[..., Case], given_up: list[Any]
) -> None:
    one = case("good", "bad")
    one.hosts.loaded("good")
    one.nodes[0]["Alive"] = False
    one.hosts.close("bad", "it could not load the model.", fix="Copy it.")
    assert one.hosts.num_places() == 0 and not one.hosts.is_end()
    one.nodes.extend(nodes("good again"))
    assert one.hosts.num_places() == 1


def test_what_another_batch_has_made_is_not_handed_out(case: Callable[..., Case]) -> None:
    one = case("a", count=4)
    make(one.videos[1:])
    one.videos[3].path.write_bytes(b"")  # damaged
    assert {video.path.name for video in one.take("a", 4)} == {
        one.videos[0].path.name,
        one.videos[3].path.name,
    }
    report = one.queue.tally.report()
    assert set(report.found) == {video.path.name for video in one.videos[1:3]}
    assert (report.done, one.seen[-1].found) == ((), 2)


def test_of_a_dead_worker_what_is_there_counts_and_the_rest_is_made_one_by_one(
    case: Callable[..., Case],
) -> None:
    one = case("a", "b", count=4, retries=1)
    given = one.take("a", 3)
    make(given[:1])
    one.queue.take_back(given, "It was killed.", "a")
    assert one.queue.tally.report().done == (given[0].path.name,)
    assert one.take("b", 4) == [given[1]]  # both are suspects
    for _ in range(2):
        assert one.take("b", 4) == [given[2]]
        one.queue.take_back([given[2]], "It was killed.", "b")
    (line,) = lines(one.list)
    assert (line["seed"], line["attempts"]) == (given[2].job.settings.seed, 2)
    assert line["host"] == one.hosts.name("b")
    assert line["error"] == "The worker died while it made this video: It was killed."
    assert one.take("b", 4) == [one.videos[3]]


def test_a_failure_of_a_worker_is_listed_with_its_host(case: Callable[..., Case]) -> None:
    one = case("a")
    (video,) = one.take("a")
    failure = Failure.of(video, "The prompt is empty.", attempts=1)
    one.queue.receive([video], BatchReport((), (failure,), 0.0), {}, node="a")
    (line,) = lines(one.list)
    assert (line["error"], line["host"]) == ("The prompt is empty.", one.hosts.name("a"))
