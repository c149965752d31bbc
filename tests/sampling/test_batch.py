"""`motionmerge batch`: every video once, whole, the same bytes, whoever is killed on the way."""

from __future__ import annotations

import errno
import json
import os
import resource
import shutil
import signal
import time
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants
from typer.testing import CliRunner

from motionmerge.cli import app
from motionmerge.errors import ConfigError, DataError
from motionmerge.io.video import read_video_metadata
from motionmerge.io.weights import save_weights
from motionmerge.sampling.batch.batch import (
    BatchOptions,
    Failure,
    Tally,
    missing,
    rank_and_world_size,
    run_batch,
    shard,
)
from motionmerge.sampling.batch.manifest import PlannedVideo, plan, read_manifest, vbench_name
from motionmerge.sampling.videos.settings import VideoSettings

from ..tiny.dynamicrafter import tiny_pipeline
from ..tiny.folders import save_dynamicrafter
from ..tiny.forks import exit_code, forked
from ..tiny.pipelines import photo
from .test_phases import moved

FAST = ["--steps", "3", "--guidance", "1", "--videos-per-switch", "3"]


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model in the hub's cache, two experts, a photo, and a manifest of eight videos."""
    folder = tmp_path_factory.mktemp("batch")
    commit = "0123456789" * 4
    repository = folder / "hub" / "models--tiny--dynamicrafter"
    pipeline = save_dynamicrafter(repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    for seed in (1, 2):
        save_weights(folder / f"{seed}.safetensors", moved(pipeline, seed), {})
    (folder / "two.yaml").write_text(
        "inputs: {one: 1.safetensors, two: 2.safetensors}\n"
        "experts: {dynamics: one, consistency: two}\n"
        "schedule: [{expert: dynamics, above: 0.64}, {expert: consistency}]\n"
    )
    photo(24).save(folder / "photo.png")
    write_manifest(
        folder,
        [
            {
                "image": "photo.png",
                "prompt": prompt,
                "seed": seed,
                "id": f"{prompt.split()[-1]}{seed}",
            }
            for prompt in ("a cat", "the camera pans up")
            for seed in range(4)
        ],
    )
    return folder


def write_manifest(folder: Path, rows: list[dict[str, Any]]) -> Path:
    path = folder / "manifest.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows) + "\n\n")
    return path


def arguments(workplace: Path, output: Path, *options: str) -> list[str]:
    (model,) = (workplace / "hub").glob("models--*/snapshots/*")
    paths = ["-o", str(output), "--model", str(model), "--recipe", str(workplace / "two.yaml")]
    return ["batch", str(workplace / "manifest.jsonl"), *paths, *FAST, *options]


def run(workplace: Path, output: Path, *options: str, **environment: str) -> dict[str, Any]:
    command = arguments(workplace, output, "--json", *options)
    result = CliRunner().invoke(app, command, env=environment)
    assert result.exit_code in (0, 1), result.output
    return json.loads(result.stdout)


@pytest.fixture(scope="module")
def expected(workplace: Path) -> dict[str, bytes]:
    """What one process makes, one video after another."""
    report = run(workplace, workplace / "alone", "--videos-per-switch", "1")
    assert len(report["done"]) == 8 and not report["failures"]
    return contents(workplace / "alone")


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.slow
def test_a_killed_process_is_started_again_and_nothing_is_lost_or_made_twice(
    workplace: Path, expected: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = arguments(workplace, tmp_path)
    command[command.index("--model") + 1] = "tiny/dynamicrafter"  # found in the cache, offline
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(workplace / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    process = forked(command)
    deadline = time.monotonic() + 300
    while not list(tmp_path.glob("*.mp4")) and time.monotonic() < deadline:
        assert os.waitpid(process, os.WNOHANG) == (0, 0), "it ended without a video"
        time.sleep(0.002)
    os.kill(process, signal.SIGKILL)
    assert exit_code(process) == -signal.SIGKILL
    there = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*.mp4")}
    assert 0 < len(there) < len(expected)

    report = run(workplace, tmp_path)
    assert report["skipped"] == len(there)
    assert len(report["done"]) == len(expected) - len(there)
    assert contents(tmp_path) == expected
    assert {path: path.stat().st_mtime_ns for path in there} == there
    assert run(workplace, tmp_path)["done"] == []


def test_processes_share_the_videos_and_make_the_same_bytes(
    workplace: Path, expected: dict[str, bytes], tmp_path: Path
) -> None:
    done = [run(workplace, tmp_path, RANK=str(rank), WORLD_SIZE="3")["done"] for rank in range(3)]
    assert [len(names) for names in done] == [3, 3, 2]
    assert contents(tmp_path) == expected


def test_other_settings_make_other_names(workplace: Path, expected: dict[str, bytes]) -> None:
    for change in (["--steps", "4"], ["--seed", "9"], ["--boundary", "0.5"], ["--dtype", "bf16"]):
        plan_only = run(workplace, workplace / "alone", "--dry-run", *change)
        is_same = change == ["--seed", "9"]  # every line has a seed of its own
        assert len(plan_only["missing"]) == (0 if is_same else 8), change
        assert not set(plan_only["missing"]) & set(expected)


def test_a_dry_run_writes_nothing_and_lists_what_is_missing(
    workplace: Path, tmp_path: Path
) -> None:
    result = CliRunner().invoke(app, arguments(workplace, tmp_path / "new", "--dry-run"))
    assert result.exit_code == 0, result.output
    assert result.stdout.splitlines()[-1] == "8 of 8 videos are missing"
    assert "cat0-seed0-" in result.stdout
    assert not (tmp_path / "new").exists()


def ask_for_a_broken_image(workplace: Path, tmp_path: Path) -> None:
    """Make a workplace like the other, whose second line has an image that cannot be read."""
    for name in ("hub", "1.safetensors", "2.safetensors", "two.yaml", "photo.png"):
        (tmp_path / name).symlink_to(workplace / name)
    (tmp_path / "broken.png").write_bytes(b"no image")
    rows = [{"image": image, "prompt": "a cat"} for image in ("photo.png", "broken.png")]
    write_manifest(tmp_path, rows)


def test_a_failed_video_is_listed_and_the_others_are_made(workplace: Path, tmp_path: Path) -> None:
    ask_for_a_broken_image(workplace, tmp_path)
    output = tmp_path / "videos"
    planned = CliRunner().invoke(app, arguments(tmp_path, output, "--dry-run"))
    assert planned.exit_code == 2 and "broken.png cannot be read as an image" in planned.stderr
    result = CliRunner().invoke(app, arguments(tmp_path, output))
    assert result.exit_code == 1, result.output
    assert "made 1, found 0, failed 1" in result.stdout
    (failure,) = map(json.loads, (output / "failures.jsonl").read_text().splitlines())
    assert (failure["id"], failure["line"], failure["attempts"]) == ("broken", 2, 1)
    assert "cannot be read as an image" in failure["error"]

    shutil.copy(workplace / "photo.png", tmp_path / "broken.png")
    assert run(tmp_path, output)["skipped"] == 1
    assert not (output / "failures.jsonl").exists()


def test_a_failure_of_one_process_is_none_for_torchrun_which_would_stop_the_others(
    workplace: Path, tmp_path: Path
) -> None:
    ask_for_a_broken_image(workplace, tmp_path)
    rows = [
        {"image": image, "prompt": "a cat", "id": f"{number}"}
        for number, image in enumerate(["broken.png", *["photo.png"] * 5])
    ]
    write_manifest(tmp_path, rows)
    output = tmp_path / "videos"
    own = arguments(tmp_path, output, "--videos-per-switch", "1")
    processes = [forked(own, RANK=str(rank), WORLD_SIZE="2") for rank in range(2)]
    assert [exit_code(process) for process in processes] == [0, 0]
    assert {path.name.partition("-")[0] for path in output.glob("*.mp4")} == set("12345")
    (failure,) = map(json.loads, (output / "failures-0.jsonl").read_text().splitlines())
    assert failure["id"] == "0"


def test_an_image_that_may_not_be_read_fails_its_videos_alone(
    workplace: Path, tmp_path: Path
) -> None:
    ask_for_a_broken_image(workplace, tmp_path)
    rows = [{"image": image, "prompt": "a cat"} for image in ("/proc/self/mem", "photo.png")]
    write_manifest(tmp_path, rows)
    report = run(tmp_path, tmp_path / "videos")
    assert len(report["done"]) == 1
    (failure,) = report["failures"]
    assert failure["id"] == "mem" and "cannot be read" in failure["error"]


def test_a_dry_run_finds_what_a_run_would_not_write_or_read(tmp_path: Path) -> None:
    photo(24).save(tmp_path / "photo.png")
    (tmp_path / "file").touch()

    def planned(prompt: str, output: str) -> str:
        row = {"image": "photo.png", "prompt": prompt}
        manifest = write_manifest(tmp_path, [row])
        command = ["batch", str(manifest), "-o", str(tmp_path / output), "--dry-run"]
        result = CliRunner().invoke(app, command)
        assert result.exit_code == (2 if "Error" in result.output else 0)
        return result.output

    assert "1 of 1 videos are missing" in planned("the camera pans left", "new/videos")
    assert "Line 1: The pocket model does not know" in planned("the dragon flies", "new/videos")
    for output in ("file", "file/below", "x" * 300):
        assert "Cannot " in planned("the camera pans left", output)
    assert {path.name for path in tmp_path.iterdir()} == {"photo.png", "file", "manifest.jsonl"}


def test_a_damaged_video_is_made_again(tmp_path: Path) -> None:
    planned = planned_videos(tmp_path, count=2)
    pipeline = tiny_pipeline()
    run_batch(pipeline, planned)
    whole = contents(tmp_path / "out")
    planned[1].path.write_bytes(b"")
    assert missing(planned) == planned[1:]
    run_batch(pipeline, missing(planned))
    assert contents(tmp_path / "out") == whole
    for video in planned:
        video.path.rename(tmp_path / "out" / f"a cat-{video.job.number}.mp4")
    (tmp_path / "out" / "a cat-0.mp4").write_bytes(b"")
    jobs = [video.job for video in planned]
    named = plan(jobs, tmp_path / "out", fingerprint={}, name_of=vbench_name)
    with pytest.raises(ConfigError, match=r"a cat-0\.mp4(.|\n)*overwrite=True"):
        missing(named)
    assert [video.path.name for video in missing(named, overwrite=True)] == ["a cat-0.mp4"]


def test_no_list_names_a_video_that_exists_or_a_process_that_takes_no_part(
    workplace: Path, tmp_path: Path
) -> None:
    ask_for_a_broken_image(workplace, tmp_path)
    output = tmp_path / "videos"

    def lists() -> set[str]:
        return {path.name for path in output.glob("failures*")}

    assert run(tmp_path, output, RANK="1", WORLD_SIZE="2")["failures"]
    assert len(run(tmp_path, output, RANK="0", WORLD_SIZE="2")["done"]) == 1
    assert lists() == {"failures-1.jsonl"}  # the other process may be running
    (output / "failures-notes.jsonl").touch()
    assert run(tmp_path, output)["failures"]
    assert lists() == {"failures.jsonl", "failures-notes.jsonl"}
    assert run(tmp_path, output, RANK="0", WORLD_SIZE="2")["skipped"] == 1
    assert lists() == {"failures-notes.jsonl"}
    assert run(tmp_path, output, RANK="1", WORLD_SIZE="2")["failures"]
    shutil.copy(workplace / "photo.png", tmp_path / "broken.png")
    assert len(run(tmp_path, output)["done"]) == 1
    assert lists() == {"failures-notes.jsonl"}


def test_two_lines_of_one_name_are_refused_by_every_process(
    workplace: Path, tmp_path: Path
) -> None:
    for name in ("hub", "1.safetensors", "2.safetensors", "two.yaml", "photo.png"):
        (tmp_path / name).symlink_to(workplace / name)
    shutil.copy(workplace / "photo.png", tmp_path / "copy.png")
    rows = [{"image": image, "id": "same", "prompt": "a"} for image in ("photo.png", "copy.png")]
    write_manifest(tmp_path, rows)
    for rank in ("0", "1"):
        command = arguments(tmp_path, tmp_path / "out")
        result = CliRunner().invoke(app, command, env={"RANK": rank, "WORLD_SIZE": "2"})
        assert result.exit_code == 2
        assert "Lines 1 and 2 would both become same-seed0-" in result.output
    assert not (tmp_path / "out").exists()


def test_a_folder_that_cannot_be_written_to_is_refused_before_the_model_is_loaded(
    workplace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("motionmerge.cli.batch.loaded", None)
    (tmp_path / "file").write_text("mine")
    for output in (tmp_path / "file", Path("/dev/null/videos")):
        result = CliRunner().invoke(app, arguments(workplace, output))
        assert result.exit_code == 2, result.output
        assert "Cannot write to the folder" in result.output and "Fix:" in result.output
    assert (tmp_path / "file").read_text() == "mine"


def planned_videos(folder: Path, *, count: int = 1) -> list[PlannedVideo]:
    """Plan videos of the tiny DynamiCrafter."""
    photo(24).save(folder / "photo.png")
    rows = [{"image": "photo.png", "prompt": "a cat", "seed": seed} for seed in range(count)]
    defaults = VideoSettings(num_inference_steps=2, guidance_scale=1, height=16, width=16)
    jobs = read_manifest(write_manifest(folder, rows), defaults=defaults)
    return plan(jobs, folder / "out", fingerprint={})


def test_a_video_that_could_not_be_written_is_tried_again(tmp_path: Path) -> None:
    pipeline, planned = tiny_pipeline(), planned_videos(tmp_path)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    limits = iter([100] * 4 + [soft] * 2)  # two steps a try
    pipeline.unet.register_forward_hook(
        lambda *_: resource.setrlimit(resource.RLIMIT_FSIZE, (next(limits), hard))
    )
    try:
        given_up = run_batch(pipeline, planned, BatchOptions(retries=0))
        report = run_batch(pipeline, planned, BatchOptions(retries=1))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert ["File too large" in failure.error for failure in given_up.failures] == [True]
    assert len(report.done) == 1 and not report.failures
    assert contents(tmp_path / "out").keys() == {planned[0].path.name}


def test_a_video_that_another_batch_has_made_meanwhile_is_not_written_again(tmp_path: Path) -> None:
    pipeline, planned = tiny_pipeline(), planned_videos(tmp_path)
    assert len(run_batch(pipeline, planned).done) == 1
    before = planned[0].path.stat()
    report = run_batch(pipeline, planned)
    assert (report.done, report.found, report.failures) == ((), (planned[0].path.name,), ())
    now = planned[0].path.stat()
    assert (now.st_ino, now.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


def test_a_full_disk_stops_the_batch(tmp_path: Path) -> None:
    pipeline, planned = tiny_pipeline(), planned_videos(tmp_path, count=3)
    calls = 0

    def fill_the_disk(*_: object) -> None:
        nonlocal calls
        calls += 1
        if calls > 2:
            raise OSError(errno.ENOSPC, "No space left on device")

    pipeline.unet.register_forward_hook(fill_the_disk)
    with pytest.raises(DataError, match=r"The batch stops(.|\n)*No space left(.|\n)*Make room"):
        run_batch(pipeline, planned, BatchOptions(retries=5))
    assert calls == 3
    assert missing(planned) == planned[1:]


def test_a_failure_list_that_cannot_be_written_is_an_error_with_a_fix(tmp_path: Path) -> None:
    (video,) = planned_videos(tmp_path)
    (tmp_path / "failures.jsonl").mkdir()
    tally = Tally(1, failure_list=tmp_path / "failures.jsonl")
    with pytest.raises(DataError, match=r"Cannot write the failure list(.|\n)*Fix:"):
        tally.failed(Failure.of(video, "it hiccuped", attempts=1))


def test_a_failure_list_grows_by_a_line_and_replaces_that_of_the_run_before(tmp_path: Path) -> None:
    (video,) = planned_videos(tmp_path)
    path = tmp_path / "failures.jsonl"
    path.write_text("of the run before\n")
    tally = Tally(3, failure_list=path)
    before = path.stat().st_ino
    inodes = []
    for number in range(3):
        tally.failed(Failure.of(video, f"{number}" * 10_000, attempts=1))
        inodes.append(path.stat().st_ino)
    assert before not in inodes and len(set(inodes)) == 1  # written once, then added to
    errors = [json.loads(line)["error"] for line in path.read_text().splitlines()]
    assert errors == ["0" * 2000, "1" * 2000, "2" * 2000]
    tally.report()
    assert [json.loads(line)["error"] for line in path.read_text().splitlines()] == errors


def test_a_failure_list_can_hold_a_reason_that_is_no_utf_8(tmp_path: Path) -> None:
    (video,) = planned_videos(tmp_path)
    tally = Tally(1, failure_list=tmp_path / "failures.jsonl")
    tally.failed(Failure.of(video, "there is no caf\udce9.png", attempts=1))
    (line,) = (tmp_path / "failures.jsonl").read_text().splitlines()
    assert json.loads(line)["error"] == "there is no caf\udce9.png"


def test_a_video_that_failed_for_another_reason_is_tried_again(tmp_path: Path) -> None:
    pipeline = tiny_pipeline()
    calls = 0

    def fail_once(*_: object) -> None:
        nonlocal calls
        calls += 1
        if calls == 1:
            raise RuntimeError("the machine hiccuped")

    pipeline.unet.register_forward_hook(fail_once)
    photo(24).save(tmp_path / "photo.png")
    manifest = write_manifest(tmp_path, [{"image": "photo.png", "prompt": "a cat"}])
    defaults = VideoSettings(num_inference_steps=2, height=16, width=16)
    planned = plan(read_manifest(manifest, defaults=defaults), tmp_path / "out", fingerprint={})
    seen = []
    report = run_batch(
        pipeline, planned, BatchOptions(retries=1), tally=Tally(1, on_progress=seen.append)
    )
    assert len(report.done) == 1 and not report.failures
    assert [now.done for now in seen] == [1]
    calls = 0
    (tmp_path / "out" / report.done[0]).unlink()
    again = run_batch(pipeline, missing(planned), BatchOptions(retries=0))
    assert [failure.error for failure in again.failures] == ["the machine hiccuped"]


def test_vbench_finds_its_names_and_other_settings_are_refused(
    workplace: Path, tmp_path: Path
) -> None:
    options = ["--names", "vbench", "--num-videos", "1"]
    report = run(workplace, tmp_path, *options)
    names = {f"{prompt}-{i}.mp4" for prompt in ("a cat", "the camera pans up") for i in range(4)}
    assert set(report["done"]) == names
    about = read_video_metadata(tmp_path / "a cat-2.mp4")
    assert (about["prompt"], about["seed"], about["num_inference_steps"]) == ("a cat", 2, 3)
    assert "sha256" in about["recipe"] and "1.safetensors" not in about["recipe"]
    assert "sha256" in str(about["weights"])
    command = arguments(workplace, tmp_path, *options, "--steps", "4")
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 2
    assert "made with other settings" in result.output


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"image": "photo.png", "promt": "x"}, "line 2.*promt"),
        ({"prompt": "x"}, "line 2.*image"),
        ({"image": "none.png", "prompt": "x"}, "line 2.*there is no"),
        ({"image": "photo.png", "prompt": "x", "id": "a/b"}, "line 2.*no id"),
        ({"image": "photo.png", "prompt": "first"}, "lines 1 and 2 are the same"),
        ([1], "line 2 is a list"),
    ],
    ids=str,
)
def test_a_wrong_line_is_named(tmp_path: Path, row: Any, message: str) -> None:
    photo(24).save(tmp_path / "photo.png")
    manifest = write_manifest(tmp_path, [{"image": "photo.png", "prompt": "first"}, row])
    with pytest.raises(DataError, match=message):
        read_manifest(manifest)


def test_a_setting_that_the_model_cannot_make_is_named_with_its_line(
    workplace: Path, tmp_path: Path
) -> None:
    shutil.copy(workplace / "photo.png", tmp_path)
    for name in ("hub", "two.yaml", "1.safetensors", "2.safetensors"):
        (tmp_path / name).symlink_to(workplace / name)
    rows = [
        {"image": "photo.png", "prompt": "x"},
        {"image": "photo.png", "prompt": "y", "width": 9},
    ]
    write_manifest(tmp_path, rows)
    result = CliRunner().invoke(app, arguments(tmp_path, tmp_path / "out"))
    assert result.exit_code == 2
    assert "Line 2" in result.output and "Fix:" in result.output


def test_prompts_that_are_no_file_names_are_refused_for_vbench(tmp_path: Path) -> None:
    photo(24).save(tmp_path / "photo.png")
    for prompt in ("left/right", "long " * 60, ""):
        jobs = read_manifest(write_manifest(tmp_path, [{"image": "photo.png", "prompt": prompt}]))
        with pytest.raises(DataError, match="cannot be a file's name"):
            plan(jobs, tmp_path, fingerprint={}, name_of=vbench_name)


def test_ranks_come_from_torchrun_or_from_a_step_of_srun() -> None:
    assert rank_and_world_size({}) == (0, 1)
    assert rank_and_world_size({"RANK": "2", "WORLD_SIZE": "4"}) == (2, 4)
    assert rank_and_world_size({"SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "2"}) == (1, 2)
    assert rank_and_world_size({"SLURM_PROCID": "0", "SLURM_NTASKS": "8"}) == (0, 1)  # no step
    parts = [shard(list(range(10)), rank, 3) for rank in range(3)]
    assert sorted(chain.from_iterable(parts)) == list(range(10))
    with pytest.raises(ConfigError, match="Rank 3 of 3"):
        shard([1], 3, 3)


@pytest.mark.parametrize("value", ["", "x", "1.5"])
def test_a_rank_that_is_no_number_is_named(workplace: Path, tmp_path: Path, value: str) -> None:
    for name, other in (("RANK", "WORLD_SIZE"), ("SLURM_STEP_NUM_TASKS", "SLURM_PROCID")):
        environment = {name: value, other: "2"}
        result = CliRunner().invoke(app, arguments(workplace, tmp_path), env=environment)
        assert result.exit_code == 2
        assert f"The environment variable {name} is {value!r}" in result.output
