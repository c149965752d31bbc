"""A pipeline's folder whose weights are codes, or are not all there, is refused before it runs."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from motionmerge.cli import app
from motionmerge.errors import CheckpointError
from motionmerge.sampling.request.folder import find_pipeline

from ..tiny.folders import save_tiny

NETWORKS = {
    "transformer": "diffusion_pytorch_model",
    "vae": "diffusion_pytorch_model",
    "text_encoder": "model",
}
networks = pytest.mark.parametrize("part", NETWORKS)


@pytest.fixture(scope="module")
def wan(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wan")
    save_tiny("Wan 2.1", folder)
    return folder


@pytest.fixture
def copy(wan: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(wan, tmp_path / "copy"))


def weights_of(folder: Path, part: str) -> Path:
    return folder / part / f"{NETWORKS[part]}.safetensors"


def split(path: Path) -> list[Path]:
    """Write a file as two shards, with their index."""
    tensors = load_file(path)
    names = list(tensors)
    shards = [path.with_name(f"{path.stem}-0000{n}-of-00002.safetensors") for n in (1, 2)]
    halves = (names[:3], names[3:])
    for shard, half in zip(shards, halves, strict=True):
        save_file({name: tensors[name] for name in half}, shard, {"format": "pt"})
    where = {name: shards[name not in halves[0]].name for name in names}
    index = path.with_name(f"{path.stem}.safetensors.index.json")
    index.write_text(json.dumps({"metadata": {}, "weight_map": where}))
    path.unlink()
    return shards


def quantise(path: Path, style: str) -> None:
    tensors = load_file(path)
    name = next(n for n, t in tensors.items() if t.ndim > 1 and n.endswith(".weight"))
    layer, scale = name.removesuffix(".weight"), tensors[name].abs().max().clamp(min=1e-3) / 448
    if style == "nf4":
        tensors[f"{layer}.weight.absmax"] = torch.ones(4)
    else:
        tensors[name] = (tensors[name] / scale).to(torch.float8_e4m3fn)
        tensors[f"{layer}.{style}"] = scale.reshape(())
    save_file(tensors, path, {"format": "pt"})


@networks
@pytest.mark.parametrize("style", ["scale_weight", "weight_scale", "weight_scale_inv", "nf4"])
def test_codes_are_not_loaded_as_if_they_were_weights(copy: Path, part: str, style: str) -> None:
    quantise(weights_of(copy, part), style)
    with pytest.raises(CheckpointError, match=f"{part} are quantised") as caught:
        find_pipeline(copy)
    assert "motionmerge merge" in str(caught.value)


def test_codes_in_one_shard_and_scales_in_another_are_found(copy: Path) -> None:
    path = weights_of(copy, "transformer")
    quantise(path, "scale_weight")
    split(path)
    with pytest.raises(CheckpointError, match="fp8_e4m3fn with `scale_weight`: 1 layers"):
        find_pipeline(copy)


def test_a_model_with_a_quantization_config_is_left_to_diffusers(copy: Path) -> None:
    quantise(weights_of(copy, "transformer"), "nf4")
    config = copy / "transformer" / "config.json"
    settings = {**json.loads(config.read_text()), "quantization_config": {"quant_method": "x"}}
    config.write_text(json.dumps(settings))
    assert "transformer" in find_pipeline(copy).weights


def test_codes_without_scales_are_plain_numbers(copy: Path) -> None:
    path = weights_of(copy, "transformer")
    tensors = load_file(path)
    save_file({name: t.to(torch.float8_e4m3fn) for name, t in tensors.items()}, path)
    assert "transformer" in find_pipeline(copy).weights


@networks
def test_a_network_without_weights_is_refused(copy: Path, part: str) -> None:
    weights_of(copy, part).unlink()
    with pytest.raises(CheckpointError, match=f"{part} holds no weights"):
        find_pipeline(copy)


@networks
def test_a_part_without_a_folder_is_refused_before_anything_is_loaded(
    copy: Path, part: str
) -> None:
    shutil.rmtree(copy / part)
    with pytest.raises(CheckpointError, match=f"lists a `{part}`, and has no folder"):
        find_pipeline(copy)


@networks
def test_all_shards_have_to_be_there(copy: Path, part: str) -> None:
    first, _ = split(weights_of(copy, part))
    assert len(find_pipeline(copy).weights[part]) == 2
    first.unlink()
    with pytest.raises(CheckpointError, match=f"{part} holds 1 of 2 shards"):
        find_pipeline(copy)


@networks
def test_a_link_that_leads_nowhere_is_called_a_link(copy: Path, part: str) -> None:
    path = weights_of(copy, part)
    path.unlink()
    path.symlink_to("../../blobs/1234")
    with pytest.raises(CheckpointError, match=r"a link to .*blobs/1234, which is not there"):
        find_pipeline(copy)


@pytest.mark.parametrize("verb", ["generate", "batch"])
def test_a_dry_run_of_a_verb_refuses_codes(copy: Path, tmp_path: Path, verb: str) -> None:
    quantise(weights_of(copy, "transformer"), "scale_weight")
    Image.new("RGB", (32, 32)).save(tmp_path / "p.png")
    line = json.dumps({"image": "p.png", "prompt": "a cat"})
    (tmp_path / "m.jsonl").write_text(line + "\n")
    what = (
        [str(tmp_path / "p.png"), "--prompt", "a cat", "-o", str(tmp_path / "v.mp4")]
        if verb == "generate"
        else [str(tmp_path / "m.jsonl"), "-o", str(tmp_path / "videos")]
    )
    result = CliRunner().invoke(app, [verb, *what, "--model", str(copy), "--dry-run"])
    assert result.exit_code == 2
    assert "are quantised" in " ".join(result.output.split())
    assert "Fix:" in result.output
