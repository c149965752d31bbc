"""Shards, pipeline folders, random rounding, and what is left when a merge is cut off."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import time

import pytest
import torch

from motionmerge.errors import CheckpointError, ConfigError
from motionmerge.io.atomic import atomic_folder, atomic_path
from motionmerge.io.weights import open_weights, save_weights
from motionmerge.io.weights_writer import parse_size, plan_shards
from motionmerge.merging.algebra.rounding import round_once, round_stochastically
from motionmerge.merging.merge import merge, realise
from motionmerge.tensors import DType

from .conftest import make_pair, same_bits


def read_all(path):
    with open_weights(path) as reader:
        return {name: reader.read(name) for name in reader.keys()}  # noqa: SIM118


def test_shards_hold_the_bits_of_the_single_file(folder):
    merge(folder / "recipe.yaml", folder / "one")
    merge(folder / "recipe.yaml", folder / "many", max_shard_size="1KB")
    shards = list((folder / "many" / "dynamics").glob("*.safetensors"))
    assert len(shards) > 2 and all("-of-0000" in path.name for path in shards)
    single = read_all(folder / "one" / "dynamics.safetensors")
    sharded = read_all(folder / "many" / "dynamics")
    assert single.keys() == sharded.keys()
    assert all(same_bits(sharded[name], single[name]) for name in single)


def test_a_shard_stays_below_its_size_unless_one_tensor_is_larger():
    specs = {str(i): (torch.float32, (n,)) for i, n in enumerate((10, 20, 300, 5, 5))}
    assert [list(shard) for shard in plan_shards(specs, 120)] == [["0", "1"], ["2"], ["3", "4"]]
    assert len(plan_shards(specs, None)) == 1


@pytest.mark.parametrize(
    ("text", "size"), [("5GB", 5 * 10**9), ("1.5 KiB", 1536), (7, 7), ("10mb", 10**7)]
)
def test_sizes_are_read_as_people_write_them(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "0", "-1", "5 apples", "GB", "1iB"])
def test_what_is_no_size_is_refused(text):
    with pytest.raises(ConfigError, match="5GB"):
        parse_size(text)


@pytest.fixture
def pipelines(folder):
    """Two pipeline folders, `base` and `tuned`, with a U-Net, a VAE and a scheduler."""
    for name, state in zip(("base", "tuned"), make_pair(), strict=True):
        pipeline = folder / name
        for part in ("unet", "vae", "scheduler"):
            (pipeline / part).mkdir(parents=True)
            (pipeline / part / "config.json").write_text(f'{{"part": "{part}"}}')
        (pipeline / "model_index.json").write_text("{}")
        unet = {key[5:]: value for key, value in state.items() if key.startswith("unet.")}
        save_weights(pipeline / "unet" / "diffusion_pytorch_model.safetensors", unet)
        save_weights(pipeline / "vae" / "diffusion_pytorch_model.safetensors", {"v": torch.ones(2)})
    text = (folder / "recipe.yaml").read_text().replace(".safetensors", "")
    (folder / "recipe.yaml").write_text(text)
    return folder


def test_a_whole_pipeline_folder_differs_only_in_the_merged_modules(pipelines):
    merge(pipelines / "recipe.yaml", pipelines / "out", layout="pipeline", max_shard_size="2KB")
    made, base = pipelines / "out" / "dynamics", pipelines / "base"
    assert (made / "unet" / "diffusion_pytorch_model.safetensors.index.json").exists()
    assert not (made / "unet" / "diffusion_pytorch_model.safetensors").exists()
    for name in ("model_index.json", "unet/config.json", "scheduler/config.json"):
        assert (made / name).read_bytes() == (base / name).read_bytes()
    vae = "vae/diffusion_pytorch_model.safetensors"
    assert (made / vae).samefile(base / vae)
    written, computed = read_all(made / "unet"), realise(pipelines / "recipe.yaml")["dynamics"]
    assert {f"unet.{name}" for name in written} == computed.keys()
    assert all(same_bits(written[name], computed[f"unet.{name}"]) for name in written)


def test_a_pipeline_folder_needs_one_at_the_front_of_the_expression(folder, pipelines):
    with pytest.raises(ConfigError, match="no pipeline folder"):
        merge(
            folder / "recipe.yaml",
            folder / "out",
            layout="pipeline",
            inputs={"base": folder / "base.safetensors"},
        )
    with pytest.raises(CheckpointError, match="lie inside"):
        merge(folder / "recipe.yaml", folder / "base" / "out")
    with pytest.raises(ConfigError, match="layout"):
        merge(folder / "recipe.yaml", folder / "out", layout="folder")


def test_folders_are_replaced_only_when_asked_and_as_a_whole(folder):
    merge(folder / "recipe.yaml", folder / "out", max_shard_size="1KB")
    with pytest.raises(ConfigError, match="exists already"):
        merge(folder / "recipe.yaml", folder / "out", max_shard_size="2KB")
    merge(folder / "recipe.yaml", folder / "out", max_shard_size="10MB", overwrite=True)
    assert [path.name for path in (folder / "out" / "dynamics").iterdir()] == [
        "diffusion_pytorch_model.safetensors"
    ]
    assert not [path for path in (folder / "out").iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize("dtype", [DType.BF16, DType.FP16])
@pytest.mark.parametrize("value", [0.7310, -1.2345e-3, 3.1e-6, -4e-8, 250.3])
def test_stochastic_rounding_keeps_the_expected_value(dtype, value):
    ideal = torch.full((40_000,), value)
    rounded = round_stochastically(ideal, dtype, "weight", seed=1)
    neighbours = rounded.unique()
    nearest = float(round_once(ideal[:1], dtype, "weight"))
    assert len(neighbours) <= 2 and nearest in neighbours.tolist()
    spread = float((neighbours[-1] - neighbours[0]).float())
    assert abs(float(rounded.double().mean()) - float(ideal[0])) < 0.02 * spread + 1e-12
    assert same_bits(rounded, round_stochastically(ideal, dtype, "weight", seed=1))


def test_stochastic_rounding_keeps_what_fits_and_what_is_not_finite():
    exact = torch.tensor([0.0, 1.0, -0.5, float("inf"), float("nan"), 65504.0])
    for dtype in (DType.FP16, DType.BF16, DType.FP32):
        expected = exact[:5].to(dtype.torch)
        rounded = round_stochastically(exact[:5], dtype, "weight", seed=0)
        assert torch.equal(rounded.nan_to_num(), expected.nan_to_num())
    assert float(round_stochastically(exact[5:], DType.FP16, "weight", seed=0)) == 65504


def test_stochastic_rounding_saves_on_average_what_bf16_swallows(folder):
    base, _ = make_pair(torch.bfloat16)
    base = {"weight": torch.full((400, 400), 0.02).bfloat16()} | base
    tuned = {name: v.float() + 2e-5 if v.is_floating_point() else v for name, v in base.items()}
    inputs = {"base": base, "tuned": tuned}
    report = merge(folder / "recipe.yaml", folder / "out", inputs=inputs, stochastic_rounding=3)
    computed = realise(folder / "recipe.yaml", inputs=inputs, stochastic_rounding=3)
    for expert, tensors in computed.items():
        written = read_all(folder / "out" / f"{expert}.safetensors")
        assert all(same_bits(written[name], tensors[name]) for name in tensors)
    plain = realise(folder / "recipe.yaml", inputs=inputs)["dynamics"]["weight"]
    moved = computed["dynamics"]["weight"].float().mean() - base["weight"].float().mean()
    assert torch.equal(plain, base["weight"])  # all of it swallowed
    assert float(moved) == pytest.approx(0.75 * -0.25 * 2e-5, rel=0.2)
    assert report.bytes_written > 0
    with open_weights(folder / "out" / "dynamics.safetensors") as reader:
        assert reader.metadata["motionmerge.stochastic_rounding"] == "3"


def test_a_full_disk_ends_with_an_error_and_nothing_is_left(folder):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (3000, hard))
    try:
        with pytest.raises(CheckpointError, match=r"Cannot write(.|\n)*free space"):
            merge(folder / "recipe.yaml", folder / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not (folder / "out").exists()


def test_a_killed_write_leaves_no_file_and_the_next_one_clears_what_it_left(tmp_path):
    code = (
        "import sys, time\n"
        "from motionmerge.io.atomic import atomic_folder, atomic_path\n"
        "with atomic_path(sys.argv[1]) as file, atomic_folder(sys.argv[2]) as folder:\n"
        "    file.write_bytes(b'half'); (folder / 'part').write_bytes(b'half')\n"
        "    print('ready', flush=True); time.sleep(600)\n"
    )
    target, shards = tmp_path / "merged.safetensors", tmp_path / "merged"
    process = subprocess.Popen(
        [sys.executable, "-c", code, target, shards], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "ready\n"
    unfinished = {path.name for path in tmp_path.iterdir()}
    with atomic_path(target) as other:  # a living process keeps its files
        other.write_bytes(b"whole")
    assert unfinished | {target.name} == {path.name for path in tmp_path.iterdir()}
    target.unlink()
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    process.stdout.close()
    assert not target.exists() and not shards.exists()
    with atomic_path(target) as file, atomic_folder(shards) as made:
        file.write_bytes(b"whole")
        (made / "part").write_bytes(b"whole")
    assert {path.name for path in tmp_path.iterdir()} == {target.name, shards.name}


def test_a_dry_run_foretells_the_room_on_the_disk(folder):
    report = merge(folder / "recipe.yaml", folder / "out", dry_run=True)
    assert report.disk_bytes == sum(expert.num_bytes for expert in report.experts.values())
    assert report.free_bytes > report.disk_bytes
    assert "GB free" in str(report)


def test_the_report_says_how_fast_and_how_much_memory(folder):
    report = merge(folder / "recipe.yaml", folder / "out")
    assert report.peak_memory > 10**6 and "peak memory" in str(report)
    assert json.loads(json.dumps(report.to_dict()))["peak_memory"] == report.peak_memory


def test_hashes_of_large_files_are_remembered_until_the_file_is_touched(tmp_path, monkeypatch):
    from motionmerge.io.hashing import REMEMBERED_BYTES, hash_file

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    path = tmp_path / "large"
    with path.open("wb") as file:
        file.truncate(REMEMBERED_BYTES)
    os.utime(path, (time.time() - 60,) * 2)
    first = hash_file(path)
    remembered = tmp_path / "cache" / "motionmerge" / "hashes.json"
    assert first in remembered.read_text() and hash_file(path) == first
    with path.open("r+b") as file:
        file.write(b"changed")
    assert hash_file(path) != first
