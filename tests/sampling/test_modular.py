"""Modular pipelines as targets of experts, and their folders as models of `generate`, `batch`."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner

from motionmerge.cli import app
from motionmerge.errors import CheckpointError, ConfigError
from motionmerge.io.video import read_video
from motionmerge.merging.recipes.recipe import Recipe
from motionmerge.sampling.families.families import configs_of
from motionmerge.sampling.request.folder import find_pipeline
from motionmerge.sampling.request.loading import load_pipeline, place
from motionmerge.sampling.request.model import FolderModel
from motionmerge.sampling.request.modular_folder import MODULAR_INDEX_FILE
from motionmerge.sampling.videos.make_video import make_video
from motionmerge.sampling.videos.settings import VideoSettings
from motionmerge.switching.expert_bank import experts

from ..switching.test_lora_bank import RESCUE, lora_for, with_lora
from ..tiny.loras import with_weights
from ..tiny.pipelines import NEWER, Family, generate, other_weights, photo, tiny, weights_of

BY_NAME = {family.name: family for family in NEWER}
SMALL = ["--steps", "2", "--height", "16", "--width", "16", "--num-frames", "5", "--dtype", "fp32"]


def save(name: str, folder: Path) -> Any:
    pipeline = tiny(BY_NAME[name])
    pipeline.save_pretrained(str(folder), overwrite_modular_index=True)
    return pipeline


@pytest.fixture(scope="module")
def wan(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny modular Wan 2.2, moved after it was saved."""
    folder = tmp_path_factory.mktemp("modular")
    save("Wan 2.2-A14B modular", folder / "before")
    return Path(shutil.move(folder / "before", folder / "wan"))


@pytest.fixture
def own_wan(wan: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(wan, tmp_path / "wan"))


def edit_index(folder: Path, **changes: Any) -> None:
    index = folder / MODULAR_INDEX_FILE
    index.write_text(json.dumps({**json.loads(index.read_text()), **changes}))


def sent_elsewhere(folder: Path, part: str) -> Any:
    """Let the index say that a part is in another repository."""
    library, kind, spec = json.loads((folder / MODULAR_INDEX_FILE).read_text())[part]
    return [library, kind, {**spec, "pretrained_model_name_or_path": "somebody/else"}]


def settings_of(**more: Any) -> VideoSettings:
    small = {"num_inference_steps": 2, "height": 32, "width": 32, "num_frames": 5}
    return VideoSettings(prompt="a cat jumps", **{**small, **more})


@pytest.mark.parametrize(
    "name", ["Wan 2.2-A14B modular", "Wan 2.1 modular", "LTX-2.5 modular", "Helios modular"]
)
def test_a_modular_pipeline_from_a_folder_makes_the_same_video(name: str, tmp_path: Path) -> None:
    saved = save(name, tmp_path / "before")
    folder = find_pipeline(shutil.move(tmp_path / "before", tmp_path / "after"))
    assert folder.limits == folder.family.limits(configs_of(saved))
    parts = {n: p for n, p in saved.components.items() if isinstance(p, torch.nn.Module)}
    assert set(folder.weights) == set(parts)
    pipeline = load_pipeline(folder)
    assert place(pipeline, folder, torch.device("cpu"), torch.float32).count("sound") == (
        name == "LTX-2.5 modular"
    )
    settings = settings_of(num_frames=folder.limits.nearest_num_frames(5))
    loaded, expected = (make_video(made, photo(), settings) for made in (pipeline, saved))
    assert torch.allclose(loaded, expected, atol=1e-4)


def test_nothing_is_fetched_from_where_an_index_points(own_wan: Path) -> None:
    edit_index(own_wan, vae=sent_elsewhere(own_wan, "vae"))
    load_pipeline(find_pipeline(own_wan))  # the folder has it all the same
    shutil.rmtree(own_wan / "vae")
    with pytest.raises(CheckpointError, match=r"no folder `vae`.*is not fetched") as caught:
        find_pipeline(own_wan)
    assert str(own_wan / "vae") in caught.value.fix


@pytest.mark.parametrize(
    "changed",
    [
        lambda folder: edit_index(folder, _blocks_class_name="MyBlocks"),
        lambda folder: (folder / "block.py").write_text("raise SystemExit"),
        lambda folder: (folder / "modular_config.json").write_text('{"auto_map": {}}'),
    ],
    ids=["another class of blocks", "a file with code", "a map to code"],
)
def test_blocks_of_somebodys_own_are_refused(changed: Any, own_wan: Path) -> None:
    changed(own_wan)
    with pytest.raises(CheckpointError, match=r"has blocks of its own \(.*\), which are not run"):
        find_pipeline(own_wan)


def test_settings_in_the_index_reach_the_pipeline(own_wan: Path) -> None:
    edit_index(own_wan, boundary_ratio=0.5)
    assert load_pipeline(find_pipeline(own_wan)).config.boundary_ratio == 0.5
    assert FolderModel(folder=find_pipeline(own_wan)).fingerprint()["configs"]


def test_a_package_that_a_model_needs_is_named_before_it_is_loaded(tmp_path: Path) -> None:
    save("MiniMax-H3", tmp_path / "h3")
    with pytest.raises(ConfigError, match="minimax-h3 needs the package torchvision"):
        find_pipeline(tmp_path / "h3")


def test_generate_and_batch_make_videos_with_a_modular_pipeline(wan: Path, tmp_path: Path) -> None:
    family = BY_NAME["Wan 2.2-A14B modular"]
    photo(24).save(tmp_path / "photo.png")
    pipeline = tiny(family)
    save_file(other_weights(pipeline, family, seed=1), tmp_path / "base.safetensors")
    run = CliRunner().invoke
    command = ["generate", str(tmp_path / "photo.png"), "--model", str(wan), "--prompt", "a cat"]
    outputs = [tmp_path / "plain.mp4", tmp_path / "moved.mp4"]
    more = ["--base", str(tmp_path / "base.safetensors"), "--motion", "0.5", "--boundary", "0.8"]
    for output, own in zip(outputs, ([], more), strict=True):
        result = run(app, [*command, *SMALL, *own, "-o", str(output)])
        assert result.exit_code == 0, result.output
    plain, moved = (read_video(output)[0] for output in outputs)
    assert plain.shape == moved.shape == (5, 3, 16, 16) and not torch.equal(plain, moved)

    (tmp_path / "list.jsonl").write_text('{"image": "photo.png", "prompt": "a cat", "id": "cat"}')
    batch = ["batch", str(tmp_path / "list.jsonl"), "-o", str(tmp_path / "out")]
    result = run(app, [*batch, "--model", str(wan), *SMALL])
    assert result.exit_code == 0, result.output
    (video,) = (tmp_path / "out").glob("*.mp4")
    assert torch.equal(read_video(video)[0], plain)


def test_a_denoiser_that_is_not_loaded_yet_is_named() -> None:
    family = BY_NAME["Wan 2.2-A14B modular"]
    full = tiny(family)
    weights = weights_of(full, family)
    pipeline = diffusers.Wan22Image2VideoModularPipeline()
    with pytest.raises(ConfigError, match=r"`transformer` of Wan22.* is not loaded yet") as caught:
        experts(pipeline, {"same": weights})
    assert "load_components" in caught.value.fix
    pipeline.update_components(transformer=full.transformer)
    with pytest.raises(ConfigError, match=r"`transformer_2` of Wan22.* is not loaded yet"):
        experts(pipeline, {"same": weights})
    own = {n.removeprefix("transformer."): w for n, w in weights.items() if "r_2." not in n}
    with experts(pipeline, {"same": own}, module="transformer"):
        pass
    pipeline.update_components(transformer_2=full.transformer_2)
    with experts(pipeline, {"same": weights}):
        pass


def test_a_denoiser_that_experts_do_not_reach_is_named() -> None:
    family = BY_NAME["MiniMax-H3"]
    made = tiny(family)
    weights = weights_of(made, family)
    pipeline = diffusers.MiniMaxH3ModularPipeline()
    pipeline.update_components(transformer=made.transformer, transformer_ref=made.transformer)
    with pytest.raises(ConfigError, match="has `transformer_ref` loaded as well"):
        experts(pipeline, {"same": weights})
    only = {name.removeprefix("transformer."): value for name, value in weights.items()}
    with experts(pipeline, {"same": only}, module="transformer"):
        pass


def test_both_transformers_of_a_folder_of_ltx_2_5_are_inputs(tmp_path: Path) -> None:
    """Its repository has the distilled one as `transformer`, and all of it beside."""
    family: Family = BY_NAME["LTX-2.5 modular"]
    pipeline = save("LTX-2.5 modular", tmp_path)
    own = weights_of(pipeline, family)
    full = other_weights(pipeline, family, seed=1)
    (tmp_path / "transformer_full").mkdir()
    save_file(
        {name.removeprefix("transformer."): value for name, value in full.items()},
        tmp_path / "transformer_full" / "diffusion_pytorch_model.safetensors",
    )
    recipe = Recipe.parse(
        f"""
        inputs:
          full: {tmp_path / "transformer_full"}
          distilled: {tmp_path / "transformer"}
        experts:
          dynamics: full + 0.5 * (full - distilled)
          consistency: distilled
        schedule:
          - {{expert: dynamics, above: 0.64}}
          - {{expert: consistency}}
        """
    )
    seen: dict[str, torch.Tensor] = {}
    with experts(pipeline, recipe=recipe) as bank:
        for expert in ("dynamics", "consistency"):
            with bank.with_expert(expert):
                seen[expert] = pipeline.transformer.proj_out.weight.clone()
    name = "transformer.proj_out.weight"
    assert torch.equal(seen["consistency"], own[name])
    torch.testing.assert_close(seen["dynamics"], full[name] + 0.5 * (full[name] - own[name]))


@pytest.mark.parametrize("name", ["Wan 2.2-A14B modular", "LTX-2.5 modular", "MiniMax-H3"])
def test_a_signed_lora_equals_dense_experts_in_a_modular_pipeline(name: str) -> None:
    family = BY_NAME[name]
    pipeline = tiny(family)
    plain, before = generate(pipeline, family), weights_of(pipeline, family)
    lora = lora_for(pipeline, family)
    with experts(pipeline, **with_weights(lora, RESCUE), boundary=family.boundary):
        signed = generate(pipeline, family)
    assert torch.equal(generate(pipeline, family), plain)
    dense = {name: with_lora(before, lora, weight) for name, weight in RESCUE.items()}
    with experts(pipeline, dense, boundary=family.boundary):
        expected = generate(pipeline, family)
    torch.testing.assert_close(signed, expected, atol=2e-3, rtol=2e-3)
    assert (signed - plain).abs().max() > 20 * (signed - expected).abs().max()
