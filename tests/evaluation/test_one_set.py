"""IS by a C3D of TorchScript against numpy, with a tiny network that stands for it."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from motionmerge.cli import app
from motionmerge.errors import CheckpointError, DataError
from motionmerge.evaluation.backbones.protocol import read_state
from motionmerge.evaluation.one_set import load_c3d
from motionmerge.evaluation.ucf101 import write_lossless
from motionmerge.evaluation.video_features import PRESETS

NUM = 12


class Colors(torch.nn.Module):
    """Probabilities of three classes: the softmax of the mean red, green and blue."""

    def forward(self, video: torch.Tensor) -> torch.Tensor:
        return (video.float().mean([2, 3, 4]) / 16).softmax(1)


class Logits(torch.nn.Module):
    """What a file without the softmax gives."""

    def forward(self, video: torch.Tensor) -> torch.Tensor:
        return video.float().mean([2, 3, 4])


class Features(torch.nn.Module):
    """Stands for I3D, under the words of StyleGAN-V's file."""

    def forward(
        self, video: torch.Tensor, rescale: bool, resize: bool, return_features: bool
    ) -> torch.Tensor:
        return video.mean([2, 3, 4])


class Pair(torch.nn.Module):
    """A network with two outputs."""

    def forward(self, video: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return video, video


@pytest.fixture
def files(tmp_path):
    torch.jit.script(Colors()).save(str(tmp_path / "c3d.pt"))
    random = np.random.default_rng(3)
    clips = [
        random.integers(0, high, (16, 16, 16, 3), np.uint8)
        for high in random.integers(20, 256, (NUM, 3))
    ]
    for number, clip in enumerate(clips):
        write_lossless(tmp_path / "made" / f"{number:02}.mkv", clip, fps=8)
    features = random.normal(size=(NUM, 3))
    np.save(tmp_path / "real.npy", features)
    torch.jit.script(Features()).save(str(tmp_path / "i3d.pt"))
    torch.jit.script(Logits()).save(str(tmp_path / "logits.pt"))
    return tmp_path, clips


def test_is_equals_the_formula_over_ten_shuffled_splits(files):
    folder, clips = files
    logits = np.stack([clip.mean((0, 1, 2)) / 16 for clip in clips])
    rows = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    rows = rows[np.random.RandomState(42).permutation(NUM)]
    scores = []
    for part in np.array_split(rows, 10):
        divergence = (part * np.log(part / part.mean(0))).sum(1)
        scores.append(np.exp(divergence.mean()))
    made = str(folder / "made")
    words = ["evaluate", "fvd", str(folder / "real.npy"), made, "--c3d", str(folder / "c3d.pt")]
    words += ["--network", str(folder / "i3d.pt"), "--json"]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)["is"]
    expected = (np.mean(scores), np.std(scores))
    assert (found["mean"], found["deviation"]) == pytest.approx(expected, rel=1e-5)
    assert found["num"] == NUM
    assert "2048" in found["doubts"]


def test_what_gives_no_probabilities_is_refused(files):
    folder, _ = files
    clip = torch.rand(16, 3, 16, 16)
    with pytest.raises(CheckpointError, match="no probabilities"):
        load_c3d(folder / "logits.pt").features(clip, PRESETS["styleganv"])
    with pytest.raises(DataError, match="takes 16 frames, not 9"):
        load_c3d(folder / "c3d.pt").features(clip[:9], PRESETS["styleganv"])


def test_flags_that_do_not_fit_are_refused_before_any_feature(files):
    folder, _ = files
    fvd = ["evaluate", "fvd", str(folder / "real.npy")]
    for name, num in (("few", 2), ("one", 1)):
        (folder / name).mkdir()
        for number in range(num):
            own = (folder / "made" / f"{number:02}.mkv").read_bytes()
            (folder / name / f"{number}.mkv").write_bytes(own)
    for words, fault in (
        ([str(folder / "made"), "--photos", str(folder)], "all four files of DreamSim"),
        ([str(folder / "made"), "--c3d", str(folder / "c3d.pt"), "--frames", "9"], "16 frames"),
        ([str(folder / "real.npy"), "--c3d", str(folder / "c3d.pt")], "need videos"),
        ([str(folder / "few"), "--c3d", str(folder / "c3d.pt")], "takes at least 10 videos"),
        ([str(folder / "one")], "holds one video"),
        ([str(folder / "made"), "--c3d", str(folder / "real.npy")], "is no TorchScript"),
    ):
        result = CliRunner().invoke(app, [*fvd, *words])
        assert result.exit_code == 2
        assert fault in result.output.replace("\n", " ")


@pytest.mark.filterwarnings("ignore:'torch.load' received")
def test_a_program_that_is_another_network_ends_the_run_at_the_first_clip(files):
    folder, _ = files
    torch.jit.script(Pair()).save(str(folder / "pair.pt"))
    for words, fault in (
        (["--network", folder / "c3d.pt"], "c3d.pt cannot compute a video"),
        (["--network", folder / "i3d.pt", "--c3d", folder / "pair.pt"], "gives a tuple"),
        (["--network", folder / "i3d.pt", "--c3d", folder / "logits.pt"], "no probabilities"),
    ):
        command = ["evaluate", "fvd", folder / "real.npy", folder / "made", *words]
        result = CliRunner().invoke(app, [*map(str, command)])
        output = result.output.replace("\n", " ")
        assert result.exit_code == 2 and fault in output
        assert "None of" not in output and ".pt" in output.partition("Fix:")[2]
    with pytest.raises(CheckpointError, match="is a TorchScript program, not a file of weights"):
        read_state(folder / "pair.pt")


def test_videos_that_cannot_be_read_are_named_where_the_rest_are_too_few_for_is(files):
    folder, _ = files
    for number in range(3):
        (folder / "made" / f"{number:02}.mkv").write_bytes(b"no video")
    command = ["evaluate", "fvd", folder / "real.npy", folder / "made"]
    command += ["--network", folder / "i3d.pt", "--c3d", folder / "c3d.pt"]
    result = CliRunner().invoke(app, [*map(str, command)])
    output = result.output.replace("\n", " ")
    assert result.exit_code == 2 and "Of 12 videos 9 can be looked at" in output
    assert "00.mkv" in output and "Give more videos" in output
