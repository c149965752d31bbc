"""XFeat is the published network, finds a shift even with random weights, and is named in results.

`tests/data/xfeat.safetensors` has what the authors' code (verlab/accelerated_features, e92685f)
makes of the same random weights: its three maps of a picture, and its key points of another.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from motionmerge.cli import app
from motionmerge.errors import CheckpointError
from motionmerge.evaluation.backbones.xfeat import XFeat, XFeatNetwork
from motionmerge.evaluation.camera import Matches, match_move
from motionmerge.evaluation.clips import read_clip
from motionmerge.evaluation.flow import to_gray
from motionmerge.evaluation.motion import measure_motion
from motionmerge.io.video import write_video

VECTORS = Path(__file__).parents[1] / "data" / "xfeat.safetensors"


def random_state() -> dict[str, torch.Tensor]:
    """Draw weights in the order of their names, so that signals neither grow nor fade."""
    generator = torch.Generator().manual_seed(0)
    state = {}
    for name, value in sorted(XFeatNetwork().state_dict().items()):
        if name.endswith("num_batches_tracked"):
            state[name] = value
            continue
        drawn = torch.randn(value.shape, generator=generator)
        if name.endswith("running_var"):
            drawn = 1 + drawn.abs() / 4
        elif value.ndim == 4:
            drawn *= math.sqrt(2 / value[0].numel())
        # Key points of random weights are hardly surer than others.
        state[name] = drawn * 4 if name == "keypoint_head.3.weight" else drawn
    return state


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("xfeat") / "xfeat.pt"
    torch.save({**random_state(), "fine_matcher.0.weight": torch.zeros(2, 2)}, path)
    return path


def picture(height: int, width: int) -> np.ndarray:
    small = np.random.default_rng(0).integers(0, 256, (height // 4, width // 4))
    return np.kron(small, np.ones((4, 4))).astype(np.uint8)


def test_the_network_and_its_key_points_are_those_of_the_published_code(weights):
    expected, xfeat = load_file(VECTORS), XFeat.load(weights)
    maps = xfeat.network(torch.from_numpy(picture(32, 64).astype(np.float32))[None, None])
    for name, found in zip(("features", "key_points", "reliability"), maps, strict=True):
        torch.testing.assert_close(found, expected[name], rtol=1e-4, atol=1e-4)
    places, features = xfeat.detect(picture(64, 96))
    assert len(places) == len(expected["places"]) > 50
    order, its_order = (np.lexsort(one.T) for one in (places, expected["places"].numpy()))
    np.testing.assert_allclose(places[order], expected["places"].numpy()[its_order], atol=1e-4)
    its_sums = expected["feature_sums"].numpy()[its_order]
    np.testing.assert_allclose(features[order].sum(1), its_sums, atol=1e-3)


@pytest.mark.parametrize("size", [(160, 256), (150, 250)])
def test_a_large_shift_is_found_by_random_features(size, weights, moving):
    frames = moving(*size, num=2, shift=(96.0, 0.0))
    move = match_move(*to_gray(frames), matchers=[XFeat.load(weights)])
    assert move is not None
    assert move.shift == pytest.approx((96, 0), abs=3)
    assert (move.zoom, move.angle) == pytest.approx((1, 0), abs=0.02)


def test_where_the_network_finds_no_key_points_there_is_no_move():
    state = random_state()
    for part in ("weight", "bias"):
        state[f"keypoint_head.3.{part}"].zero_()
    network = XFeatNetwork()
    network.load_state_dict(state)
    gray = picture(64, 96)
    assert match_move(gray, gray, matchers=[XFeat(network, "sha256:0")]) is None


def test_the_next_matcher_is_asked_only_where_the_one_before_finds_nothing(moving, tmp_path):
    asked = []

    def none(first: np.ndarray, second: np.ndarray) -> Matches:
        asked.append("none")
        return np.empty((0, 2), np.float32), np.empty((0, 2), np.float32)

    def known(first: np.ndarray, second: np.ndarray) -> Matches:
        asked.append("known")
        grid = np.stack(np.meshgrid(np.arange(0, 256, 16), np.arange(0, 160, 16)), -1)
        here = grid.reshape(-1, 2).astype(np.float32)
        return here, here + np.float32([100, 0])

    write_video(tmp_path / "x.mp4", moving(160, 256, num=2, shift=(100.0, 0.0)), fps=8)
    clip = read_clip(tmp_path / "x.mp4")
    lost = measure_motion(clip, matchers=[none])
    assert lost["camera_label"] == "unclear"
    found = measure_motion(clip, matchers=[none, known])
    assert found["camera_label"] == "pan_left"
    assert found["camera_pan"] == pytest.approx(-100 / 256, rel=0.03)
    assert asked == ["none", "none", "known"]
    measure_motion(clip, matchers=[known, none])
    assert asked[3:] == ["known"]


def test_other_weights_are_refused_by_name_and_those_used_are_recorded(weights, tmp_path, moving):
    state = random_state()
    del state["block1.0.layer.0.weight"]
    save_file(state, tmp_path / "other.safetensors")
    with pytest.raises(CheckpointError, match=r"holds no XFeatNetwork: 1 tensors are missing"):
        XFeat.load(tmp_path / "other.safetensors")
    for value in (math.nan, math.inf, 1j):
        state = random_state()
        state["block1.0.layer.0.weight"] = state["block1.0.layer.0.weight"] * value
        torch.save(state, tmp_path / "damaged.pt")
        with pytest.raises(CheckpointError, match=r"block1\.0\.layer\.0\.weight.* finite real"):
            XFeat.load(tmp_path / "damaged.pt")
    write_video(tmp_path / "x.mp4", moving(64, 96, num=3, shift=(2.0, 0.0)), fps=8)

    def run(*words: object):
        return CliRunner().invoke(app, ["measure", str(tmp_path / "x.mp4"), *map(str, words)])

    refused = run("--xfeat", tmp_path / "other.safetensors")
    assert refused.exit_code == 2 and "Fix:" in refused.stderr
    output = tmp_path / "out"
    for words in ((), ("--xfeat", weights)):
        assert run("-o", output, *words).exit_code == 0
    rows = [json.loads(line) for line in (output / "rows.jsonl").read_text().splitlines()]
    degrees = [row for row in rows if row["metric"] == "motion_degree"]
    assert len({row["config"] for row in degrees}) == len(degrees) == 2
    fingerprint = XFeat.load(weights).fingerprint
    assert json.loads((output / "summary.json").read_text())["networks"] == {"xfeat": fingerprint}
    assert json.loads(run("--xfeat", weights, "--json").stdout)["networks"]["xfeat"] == fingerprint
