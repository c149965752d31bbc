"""A run goes on after a kill, names what it cannot measure, and writes VBench's own files."""

from __future__ import annotations

import json
import os

import pytest
import torch
from typer.testing import CliRunner

from motionmerge.cli import app
from motionmerge.errors import CheckpointError, ConfigError, DataError
from motionmerge.evaluation.row_files import Shard
from motionmerge.evaluation.vbench.dimensions import clips_of, decode, measure_of
from motionmerge.evaluation.vbench.frames import ERAS
from motionmerge.evaluation.vbench.results import (
    aggregate,
    read_scores,
    vbench_json,
    write_vbench,
)
from motionmerge.evaluation.vbench.run import missing_files, plan, run
from motionmerge.evaluation.vbench.sources import Networks
from motionmerge.evaluation.vbench.suite import clips_of_folder
from motionmerge.evaluation.vbench.total import DIMENSIONS, totals
from motionmerge.io.video import read_frames

CHEAP = ("temporal_flickering", "camera_motion")

TRACK = """
import torch
def track(frames):
    return torch.zeros(len(frames), 100, 2)
"""


@pytest.fixture
def folder(vbench, tmp_path):
    videos = tmp_path / "videos"
    videos.mkdir()
    clip = (vbench.folder / "short" / "short-3.mp4").read_bytes()
    for name in ("hills, camera static-0.mp4", "hills, camera pans left-0.mp4"):
        (videos / name).write_bytes(clip)
    one = (vbench.folder / "short" / "short-1.mp4").read_bytes()
    (videos / "one-0.mp4").write_bytes(one)
    return videos


@pytest.fixture
def networks(tmp_path):
    plugin = tmp_path / "track.py"
    plugin.write_text(TRACK)
    return Networks({"cotracker": plugin}, {})


def measured(folder, networks, output):
    clips = clips_of_folder(folder, images=None)
    jobs = plan(clips, networks, era=ERAS[0], dimensions=CHEAP)
    return clips, run(jobs, networks, era=ERAS[0], folder=output)


def test_a_killed_run_goes_on_and_gives_the_same_rows(folder, networks, tmp_path):
    _, rows = measured(folder, networks, tmp_path / "out")
    path = tmp_path / "out" / "vbench.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:2]) + lines[2][:20])
    _, again = measured(folder, networks, tmp_path / "out")
    assert again == rows
    assert sorted(path.read_bytes().splitlines(keepends=True)) == sorted(lines)


def test_another_plugin_or_clip_is_measured_anew(folder, networks, tmp_path):
    measured(folder, networks, tmp_path / "out")
    path = networks.paths["cotracker"]
    path.write_text(TRACK.replace("zeros", "ones"))
    measured(folder, networks, tmp_path / "out")
    lines = [json.loads(line) for line in (tmp_path / "out" / "vbench.jsonl").open()]
    assert len([one for one in lines if one["metric"] == "vbench.camera_motion"]) == 4
    assert len([one for one in lines if one["metric"] == "vbench.temporal_flickering"]) == 3


def test_a_clip_of_one_frame_is_named_and_ends_nothing(folder, networks, tmp_path):
    """VBench writes NaN for it, or ends with an error after all earlier clips."""
    scores = aggregate(measured(folder, networks, tmp_path / "out")[1])
    flicker = scores["temporal_flickering"]
    assert len(flicker.rows) == 2
    assert "1 of the 2 frames" in flicker.faults["one-0.mp4"]


def test_results_have_vbenchs_layout_and_flickering_has_a_file_of_its_own(
    folder, networks, tmp_path
):
    clips, rows = measured(folder, networks, tmp_path / "out")
    scores = aggregate(rows)
    written = write_vbench(tmp_path, "mine", vbench_json(scores, clips))
    assert [path.name for path in written] == [
        "mine_eval_results.json",
        "mine_temporal_flickering_eval_results.json",
    ]
    content = json.loads(written[0].read_text())
    assert list(content) == ["camera_motion"]
    score, moves, videos = content["camera_motion"]
    assert (score, moves) == (0.5, {"pan_left": 0.0, "static": 1.0})  # no NaN for other moves
    assert {video["prompt_type"] for video in videos} == {"pan_left", "static"}
    read = read_scores(written)
    assert read == {name: score.score for name, score in scores.items()}


def test_vbenchs_own_file_with_nan_and_flickering_is_read(tmp_path):
    path = tmp_path / "x_eval_results.json"
    path.write_text('{"camera_motion": [0.6, {"tilt_up": NaN}, []], "temporal_flickering": [0.9]}')
    assert read_scores([tmp_path]) == {"camera_motion": 0.6, "temporal_flickering": 0.9}
    path.write_text('{"camera_motion": [NaN, {}, []]}')
    with pytest.raises(DataError, match="camera_motion is no number"):
        read_scores([path])


def test_fastvideos_scores_are_read_and_those_it_skipped_are_not_counted(tmp_path):
    def result(score):
        return {"vbench.dynamic_degree": {"name": "x", "score": score, "details": {}},
                "common.ssim": {"name": "common.ssim", "score": 0.3, "details": {}}}  # fmt: skip

    path = tmp_path / "scores.json"
    videos = [{"video": f"{n}.mp4", "scores": result(s)} for n, s in enumerate([1.0, 0.0, None])]
    path.write_text(json.dumps(videos))
    assert read_scores([path]) == {"dynamic_degree": 0.5}


def test_every_dimension_says_which_file_switches_it_on(networks):
    off = missing_files(networks)
    assert "camera_motion" not in off
    assert "temporal_flickering" not in off
    assert list(off["aesthetic_quality"]) == ["clip-l14", "aesthetic"]


def test_weights_of_another_network_are_refused_by_name(vbench):
    paths = vbench.networks.paths
    with pytest.raises(CheckpointError, match="no vision transformer of a known maker"):
        Networks({"dino": paths["raft"]}, {}).dino()
    with pytest.raises(CheckpointError, match=r"holds no Raft: \d+ tensors are missing"):
        Networks({"raft": paths["dino"]}, {}).raft()


def test_a_plugin_that_fails_is_named(folder, tmp_path):
    plugin = tmp_path / "bad.py"
    plugin.write_text("def track(frames):\n    raise RuntimeError('no GPU')\n")
    with pytest.raises(ConfigError, match=r"bad\.py fails: RuntimeError: no GPU"):
        measured(folder, Networks({"cotracker": plugin}, {}), tmp_path / "out")


def test_clip_and_vit_of_transformers_are_the_same_networks(tmp_path):
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection, ViTConfig, ViTModel

    size = {"hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2}
    size |= {"num_attention_heads": 3, "image_size": 224}
    torch.manual_seed(0)
    pixels = torch.randn(2, 3, 224, 224)
    clip = CLIPVisionModelWithProjection(
        CLIPVisionConfig(**size, patch_size=32, projection_dim=16)
    ).eval()
    clip.save_pretrained(tmp_path / "clip")
    ours = Networks({"clip-b32": tmp_path / "clip"}, {"clip-b32": 3}).clip("clip-b32")
    assert torch.allclose(ours.encode(pixels), clip(pixels).image_embeds, atol=1e-5)
    vit = ViTModel(ViTConfig(**size, patch_size=16, layer_norm_eps=1e-6)).eval()
    vit.save_pretrained(tmp_path / "vit")
    ours = Networks({"dino": tmp_path / "vit"}, {"dino": 3}).dino()
    assert torch.allclose(ours.encode(pixels), vit(pixels).last_hidden_state[:, 0], atol=1e-5)


def test_the_command_measures_checks_and_totals(folder, networks, tmp_path):
    def call(*words):
        return CliRunner().invoke(app, ["evaluate", *map(str, words)])

    cotracker = networks.paths["cotracker"]
    output = tmp_path / "out"
    words = ("vbench", folder, "-o", output, "--weights", f"cotracker={cotracker}")
    dry = call(*words, "--dry-run")
    assert "--weights raft=PATH" in dry.output
    assert "on one CPU core" in dry.output
    assert not output.exists()
    summary = json.loads(call(*words, "--json").stdout)
    assert summary["dimensions"]["camera_motion"]["score"] == 0.5
    assert summary["resize"] == "torchvision>=0.17"
    assert summary["networks"]["cotracker"].startswith("sha256:")
    assert "i2v_subject" in summary["missing"]["total"]
    checked = call("check", folder)
    assert checked.exit_code == 1
    assert "one-frame: 1" in checked.output
    found = call("total", output)
    assert "camera_motion" in found.output
    assert "without subject_consistency" in found.output


def test_methods_stand_beside_each_other_with_a_total_where_nothing_is_missing(tmp_path):
    """An aesthetic score below 0, which a linear layer gives of noise, counts as any other."""
    whole = {name: [0.5, []] for name in DIMENSIONS[:-1]} | {"aesthetic_quality": [-0.07, []]}
    part = {"camera_motion": [0.25, {}, []]}
    for name, content in (("base", whole), ("edg", part)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "x_eval_results.json").write_text(json.dumps(content))
    words = ["evaluate", "total", str(tmp_path / "base"), str(tmp_path / "edg")]
    lines = CliRunner().invoke(app, words).stdout.splitlines()
    table = {line.split()[0]: line.split()[1:] for line in lines}
    expected = totals({name: own[0] for name, own in whole.items()})
    assert table["%"] == ["base", "edg"]
    assert table["camera_motion"] == ["50.00", "25.00"]
    assert table["aesthetic_quality"] == ["-7.00", "-"]
    assert table["total"] == [f"{100 * expected.total:.2f}", "-"]
    found = json.loads(CliRunner().invoke(app, [*words, "--json"]).stdout)
    assert found["base"]["total"] == pytest.approx(expected.total)
    assert "i2v_subject" in found["edg"]["missing"]["total"]


@pytest.mark.parametrize(
    "score", ["true", '"0.5"', "1.2", "-0.3", "1e999", "1" + "0" * 400, "null", "[0.5]"]
)
def test_a_score_that_cannot_be_is_refused(tmp_path, score):
    path = tmp_path / "x_eval_results.json"
    path.write_text(f'{{"camera_motion": [{score}, {{}}, []]}}')
    with pytest.raises(DataError, match="camera_motion is "):
        read_scores([path])
    if score not in ("1.2", "-0.3"):  # what no rule keeps in 0..1 is a number all the same
        path.write_text(f'{{"aesthetic_quality": [{score}, []]}}')
        with pytest.raises(DataError, match="aesthetic_quality is "):
            read_scores([path])
    path.write_text(f'[{{"scores": {{"vbench.dynamic_degree": {{"score": {score}}}}}}}]')
    if score == "null":  # FastVideo skipped the metric
        return
    with pytest.raises(DataError, match="dynamic_degree is "):
        read_scores([path])


ROW = {"clip": "c", "metric": "vbench.dynamic_degree", "config": "f", "video": "a.mp4"}


@pytest.mark.parametrize(
    "changed",
    [
        {"value": True},
        {"value": "0.5"},
        {"value": 1.5},
        {"value": float("nan")},
        {"value": 1.0, "clip": 3},
        {"value": 1.0, "details": []},
        {"value": 1.0, "metric": "vbench.subject_consistency"},
        {"value": 1.0, "metric": "vbench.camera_motion", "details": {"prompt_type": 3}},
    ],
    ids=str,
)
def test_a_line_that_no_run_can_have_written_is_refused(tmp_path, networks, changed):
    path = tmp_path / "vbench.jsonl"
    path.write_text(json.dumps({**ROW, "details": {}, **changed}) + "\n{}\n")
    with pytest.raises(DataError, match="line 1 is no result"):
        run([], networks, era=ERAS[0], folder=tmp_path)


def test_a_fault_is_tried_again_and_contradictions_are_refused(tmp_path, networks):
    lines = [{**ROW, "details": {}, "value": value} for value in (1.0, None, 1.0)]
    path = tmp_path / "vbench.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    run([], networks, era=ERAS[0], folder=tmp_path)
    path.write_text(
        "".join(json.dumps({**line}) + "\n" for line in [*lines, {**lines[0], "value": 0.0}])
    )
    with pytest.raises(DataError, match=r"as 1\.0 and 0\.0"):
        run([], networks, era=ERAS[0], folder=tmp_path)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs pipes")
def test_a_pipe_among_the_files_is_not_waited_for(tmp_path, networks):
    os.mkfifo(tmp_path / "vbench.jsonl")
    with pytest.raises(DataError, match="no plain file"):
        run([], networks, era=ERAS[0], folder=tmp_path)
    os.mkfifo(tmp_path / "x_eval_results.json")
    with pytest.raises(DataError, match="no plain file"):
        read_scores([tmp_path])


NETWORKS = ("background_consistency", "temporal_flickering")


def test_seven_parts_are_one_run(folder, vbench, tmp_path):
    """With random networks; the order in which the parts run does not count."""
    short = vbench.folder / "short"
    for number, name in enumerate(("a-0", "b-0", "c-0")):
        (folder / f"{name}.mp4").write_bytes(
            (short / "short-3.mp4").read_bytes() + bytes(number + 1)
        )
    clips = clips_of_folder(folder, images=None)
    settings = {"era": ERAS[0], "dimensions": NETWORKS}
    whole = run(
        plan(clips, vbench.networks, **settings),
        vbench.networks,
        era=ERAS[0],
        folder=tmp_path / "whole",
    )
    parts = tmp_path / "parts"
    for number in range(7, 0, -1):
        shard = Shard(number, 7)
        jobs = plan(clips, vbench.networks, **settings, shard=shard)
        run(jobs, vbench.networks, era=ERAS[0], folder=parts, shard=shard)
    assert len(list(parts.iterdir())) > 1
    again = run(
        plan(clips, vbench.networks, **settings), vbench.networks, era=ERAS[0], folder=parts
    )
    assert not (parts / "vbench.jsonl").exists()  # but for what failed, which fails the same way
    scores, others = aggregate(whole), aggregate(again)
    assert list(scores) == list(NETWORKS)
    for name, score in scores.items():
        assert score.score == pytest.approx(others[name].score, abs=1e-9)
        assert (len(score.rows), score.faults) == (len(others[name].rows), others[name].faults)


def test_the_results_of_the_whole_do_not_stay_beside_a_part(folder, tmp_path):
    def call(*words):
        words = ("evaluate", "vbench", folder, "-o", tmp_path / "out", *words)
        return CliRunner().invoke(app, [*map(str, words)])

    results = {"summary.json", "motionmerge_temporal_flickering_eval_results.json"}
    assert call().exit_code == 0
    assert results <= {path.name for path in (tmp_path / "out").iterdir()}
    part = call("--shard", "1/2")
    assert "part 1/2 alone" in part.output
    assert not results & {path.name for path in (tmp_path / "out").iterdir()}
    assert call("--shard", "3/2").exit_code == 2


@pytest.mark.parametrize("tracks", ["float('nan') * torch.ones(len(frames), 100, 2)", "None"])
def test_what_a_plugin_gives_is_checked_before_it_is_kept(folder, networks, tmp_path, tracks):
    networks.paths["cotracker"].write_text(f"import torch\ndef track(frames): return {tracks}\n")
    for _ in range(2):
        _, rows = measured(folder, networks, tmp_path / "out")
    faults = [row for row in rows if row.dimension == "camera_motion"]
    assert [row.value for row in faults] == [None, None]


def test_a_gpu_that_is_not_there_is_named(networks):
    with pytest.raises(ConfigError, match="no device"):
        Networks(networks.paths, {}, "tpu")
    if not torch.cuda.is_available():
        with pytest.raises(ConfigError, match="no GPU"):
            Networks(networks.paths, {}, "cuda")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_gives_the_scores_of_the_cpu(vbench):
    clips = clips_of_folder(vbench.folder / "videos", images=vbench.folder / "images")
    on_gpu = Networks(vbench.networks.paths, vbench.networks.num_heads, "cuda")
    dimensions = [name for name in DIMENSIONS if not on_gpu.missing_for(name)]
    for dimension in dimensions:
        for clip in clips_of(dimension, clips[:2]):
            first, second = (
                measure_of(dimension, one, era=ERAS[0])(decode(clip)).value
                for one in (vbench.networks, on_gpu)
            )
            assert second == pytest.approx(first, abs=2e-4), dimension


def test_a_playlist_that_is_called_a_video_opens_no_other_file(vbench, tmp_path):
    clip = vbench.folder / "short" / "short-3.mp4"
    playlist = f"ffconcat version 1.0\nfile '{clip.name}'\n"
    (tmp_path / clip.name).write_bytes(clip.read_bytes())
    (tmp_path / "list-0.mp4").write_text(playlist)
    with pytest.raises(DataError, match="Cannot read"):
        read_frames(tmp_path / "list-0.mp4")
