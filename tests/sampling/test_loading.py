"""Pipelines from folders: looked at before they are loaded, no code, no pickles, no surprise."""

from __future__ import annotations

import json
import os
import shutil
import struct
from pathlib import Path
from typing import Any

import pytest
import torch

from motionmerge.errors import CheckpointError, ConfigError
from motionmerge.io.weights import save_weights
from motionmerge.memory import free_memory
from motionmerge.models.dynamicrafter.unet import DynamiCrafterUNet
from motionmerge.sampling.families.families import configs_of
from motionmerge.sampling.request import bounded_networks
from motionmerge.sampling.request.folder import find_pipeline, variant_of, weight_files
from motionmerge.sampling.request.loading import (
    check_memory,
    dtype_named,
    empty_modules,
    load_pipeline,
    place,
)
from motionmerge.sampling.request.model import FolderModel
from motionmerge.sampling.videos.make_video import encode_ahead, make_video
from motionmerge.sampling.videos.settings import VideoSettings

from ..tiny.folders import save_dynamicrafter, save_tiny
from ..tiny.pipelines import photo

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def wan(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wan")
    save_tiny("Wan 2.2-A14B", folder)
    return folder


@pytest.fixture
def copy(wan: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(wan, tmp_path / "copy"))


def edit_index(folder: Path, **changes: object) -> None:
    index = folder / "model_index.json"
    index.write_text(json.dumps({**json.loads(index.read_text()), **changes}))


@pytest.mark.parametrize("name", ["Wan 2.2-A14B", "SVD", "DynamiCrafter"])
def test_a_pipeline_from_a_folder_makes_the_same_video(name: str, tmp_path: Path) -> None:
    saved = save_dynamicrafter(tmp_path) if name == "DynamiCrafter" else save_tiny(name, tmp_path)
    folder = find_pipeline(tmp_path)
    assert folder.limits == folder.family.limits(configs_of(saved))
    pipeline = load_pipeline(folder)
    pipeline.set_progress_bar_config(disable=True)
    asked = VideoSettings(
        prompt="a cat jumps" if folder.family.takes_text else None,
        num_inference_steps=1,
        height=32,
        width=32,
        num_frames=None if name == "DynamiCrafter" else 5,
    )
    loaded, expected = (make_video(made, photo(), asked) for made in (pipeline, saved))
    assert torch.allclose(loaded, expected, atol=1e-4)


def test_dynamicrafter_encodes_and_frees_its_towers_before_its_unet_is_loaded(
    tmp_path: Path,
) -> None:
    save_dynamicrafter(tmp_path)
    asked = VideoSettings(prompt="a cat jumps", num_inference_steps=1, height=32, width=32)
    found: list[Any] = []

    def encode(pipeline: Any) -> None:
        assert pipeline.text_encoder is not None
        assert not isinstance(pipeline.unet, torch.nn.Module)
        found.extend(encode_ahead(pipeline, photo(), [asked]))

    model = FolderModel(folder=find_pipeline(tmp_path), device=CPU)
    ahead, _ = model.load(encode)
    assert ahead.text_encoder is None and ahead.image_encoder is None
    assert isinstance(ahead.unet, DynamiCrafterUNet) and not ahead.unet.training
    plain, _ = model.load()
    for pipeline in (ahead, plain):
        pipeline.set_progress_bar_config(disable=True)
    video = make_video(ahead, photo(), asked, conditions=found[0])
    assert torch.equal(video, make_video(plain, photo(), asked))

    (tmp_path / "unet" / "diffusion_pytorch_model.safetensors").write_bytes(b"short")
    with pytest.raises(CheckpointError, match="Fix"):
        model.load(encode)


def test_the_memory_it_takes_is_known_before_it_is_loaded(wan: Path) -> None:
    folder = find_pipeline(wan)
    pipeline = load_pipeline(folder)
    for part, num_bytes in folder.num_bytes(torch.float32).items():
        tensors = getattr(pipeline, part).state_dict().values()
        unique = {tensor.data_ptr(): tensor.nbytes for tensor in tensors}
        assert num_bytes == sum(unique.values()), part
    assert sum(folder.num_bytes(torch.bfloat16).values()) * 2 == sum(
        folder.num_bytes(torch.float32).values()
    )
    assert "main memory" in place(pipeline, folder, CPU, torch.float32)


def test_a_model_that_does_not_fit_is_refused_before_it_is_loaded(copy: Path) -> None:
    assert (free_memory(CPU) or 1) > 0
    entries = 10**12
    header = json.dumps(
        {"w": {"dtype": "F32", "shape": [entries], "data_offsets": [0, 4 * entries]}}
    ).encode()
    path = next((copy / "transformer").glob("*.safetensors"))
    path.write_bytes(struct.pack("<Q", len(header)) + header)
    os.truncate(path, 8 + len(header) + 4 * entries)  # a hole, not four terabytes
    with pytest.raises(ConfigError, match=r"4000\.0 GB.*are free") as caught:
        check_memory(find_pipeline(copy), torch.float32, CPU)
    assert "bf16" in caught.value.fix


def test_pickles_are_read_only_when_asked_for(copy: Path) -> None:
    pipeline = load_pipeline(find_pipeline(copy))
    for part in ("transformer", "transformer_2"):
        for path in (copy / part).glob("*.safetensors"):
            path.unlink()
        module = getattr(pipeline, part)
        torch.save(module.state_dict(), copy / part / "diffusion_pytorch_model.bin")
    with pytest.raises(CheckpointError, match="pickles") as caught:
        find_pipeline(copy)
    assert "legacy=True" in caught.value.fix
    again = load_pipeline(find_pipeline(copy, legacy=True), legacy=True)
    for name, value in pipeline.transformer.state_dict().items():
        assert torch.equal(again.transformer.state_dict()[name], value)


def test_code_in_a_folder_is_not_run(copy: Path) -> None:
    marker = copy / "ran"
    (copy / "transformer" / "evil.py").write_text(f"open({str(marker)!r}, 'w')")
    edit_index(copy, transformer=["evil", "WanTransformer3DModel"])
    with pytest.raises(CheckpointError, match="needs code of its own"):
        find_pipeline(copy)
    edit_index(copy, _class_name=["evil", "Pipeline"])
    with pytest.raises(CheckpointError):
        find_pipeline(copy)
    assert not marker.exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"_class_name": "FluxPipeline"}, "FluxPipeline"),
        ({"_class_name": "WanPipeline"}, "from text alone"),
        ({"_class_name": "PocketPipeline"}, "pocket"),
        ({"tokenizer": [None, None]}, "no tokenizer"),
    ],
)
def test_other_pipelines_are_refused_by_name(
    copy: Path, changes: dict[str, object], message: str
) -> None:
    edit_index(copy, **changes)
    with pytest.raises((CheckpointError, ConfigError), match=message):
        find_pipeline(copy)


def test_only_dynamicrafter_is_sent_to_convert_for_a_tokenizer(copy: Path, tmp_path: Path) -> None:
    save_dynamicrafter(tmp_path / "dynamicrafter")
    for folder, fix in ((copy, "whole folder"), (tmp_path / "dynamicrafter", "convert")):
        edit_index(folder, tokenizer=[None, None])
        with pytest.raises(CheckpointError, match="no tokenizer") as caught:
            find_pipeline(folder)
        assert fix in str(caught.value.fix)


def test_a_text_pipeline_with_the_same_parts_is_called_as_the_image_pipeline(
    tmp_path: Path,
) -> None:
    save_tiny("LTX", tmp_path)
    edit_index(tmp_path, _class_name="LTXPipeline")
    pipeline = load_pipeline(find_pipeline(tmp_path))
    assert type(pipeline).__name__ == "LTXImageToVideoPipeline"


def test_a_damaged_folder_is_an_error_with_a_fix(copy: Path) -> None:
    (copy / "text_encoder" / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="cannot be"):
        load_pipeline(find_pipeline(copy))
    (copy / "vae" / "config.json").write_text("[]")
    with pytest.raises(CheckpointError, match="no mapping"):
        find_pipeline(copy)
    (copy / "model_index.json").unlink()
    with pytest.raises(CheckpointError, match=r"model_index\.json"):
        find_pipeline(copy)
    with pytest.raises(CheckpointError, match="no folder"):
        find_pipeline(copy / "nowhere")


@pytest.mark.parametrize(
    "name", ["~nobody_is_called_this/x", "long" * 100, "owner/" + "long" * 100, "a\0b"]
)
def test_a_name_that_no_folder_could_have_is_an_error_with_a_fix(
    name: str,
) -> None:
    with pytest.raises(CheckpointError, match="no folder") as caught:
        find_pipeline(name)
    assert caught.value.fix


def test_one_variant_of_the_weights_is_taken(tmp_path: Path) -> None:
    names = [
        "model.safetensors",
        "model.fp16-00001-of-00002.safetensors",
        "model.fp16-00002-of-00002.safetensors",
        "model.bin",
    ]
    for name in names[:3]:
        save_weights(tmp_path / name, {name: torch.zeros(1)}, {})
    (tmp_path / names[3]).touch()
    assert [path.name for path in weight_files(tmp_path)] == names[:1]
    assert [path.name for path in weight_files(tmp_path, variant="fp16")] == names[1:3]
    assert [path.name for path in weight_files(tmp_path, variant="bf16")] == names[:1]


def test_dtypes_have_names() -> None:
    assert dtype_named("bf16") is torch.bfloat16
    with pytest.raises(ConfigError, match="bf17"):
        dtype_named("bf17")


@pytest.mark.parametrize("changed", ["vae", "text_encoder", "tokenizer", "scheduler"])
def test_a_change_to_any_part_changes_the_fingerprint(copy: Path, changed: str) -> None:
    before = FolderModel(folder=find_pipeline(copy)).fingerprint()
    assert FolderModel(folder=find_pipeline(copy)).fingerprint() == before
    files = [file for file in (copy / changed).iterdir() if file.name != "config.json"]
    content = bytearray(files[0].read_bytes())
    if files[0].suffix == ".json":  # which is read at once, to see whether it names code
        content += b" "
    else:
        content[-2] ^= 1
    files[0].write_bytes(content)
    after = FolderModel(folder=find_pipeline(copy)).fingerprint()
    assert after != before and after["model"] == before["model"]


def test_a_vocabulary_beside_a_configuration_or_in_a_folder_of_its_own_counts_too(
    copy: Path,
) -> None:
    tokenizer = copy / "tokenizer"
    (tokenizer / "config.json").write_text("{}")
    (tokenizer / "more").mkdir()
    (tokenizer / "more" / "words.txt").write_text("a b")
    seen = []
    for file in ("tokenizer.json", "more/words.txt"):
        seen.append(FolderModel(folder=find_pipeline(copy)).fingerprint()["parts"])
        with (tokenizer / file).open("a") as stream:
            stream.write(" ")
    seen.append(FolderModel(folder=find_pipeline(copy)).fingerprint()["parts"])
    assert len(set(seen)) == 3
    for name in (".DS_Store", "model.onnx", "README.md", "weights.index.json"):
        (tokenizer / name).write_text("nobody reads this")
    assert FolderModel(folder=find_pipeline(copy)).fingerprint()["parts"] == seen[-1]


# Folders of strangers


def test_code_that_a_part_names_is_refused_by_name_and_nothing_asks(
    copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def asked(*_: object) -> str:
        raise AssertionError("a question on the terminal")

    monkeypatch.setattr("builtins.input", asked)
    edit_index(copy, text_encoder=["transformers", "AutoModel"])
    for name in ("config.json", "tokenizer_config.json"):
        part = copy / ("text_encoder" if name == "config.json" else "tokenizer")
        settings = json.loads((part / name).read_text())
        (part / name).write_text(json.dumps({**settings, "auto_map": {"AutoModel": "m.Code"}}))
        with pytest.raises(CheckpointError, match=rf"{part.name}.*auto_map.*not run") as caught:
            find_pipeline(copy)
        assert caught.value.fix
        (part / name).write_text(json.dumps(settings))


@pytest.mark.parametrize(
    "content", ["[" * 200_000, '{"a":' * 100_000, "null", "[]", "{", "9" * 5000]
)
@pytest.mark.parametrize("file", ["model_index.json", "vae/config.json", "tokenizer/config.json"])
def test_json_of_any_kind_is_answered(copy: Path, file: str, content: str) -> None:
    (copy / file).write_text(content)
    with pytest.raises(CheckpointError) as caught:
        find_pipeline(copy)
    assert caught.value.fix


@pytest.mark.parametrize("name", ["../elsewhere", "/etc", "a/b"])
def test_a_part_is_a_folder_in_the_pipeline(copy: Path, name: str) -> None:
    edit_index(copy, **{name: ["diffusers", "AutoencoderKL"]})
    with pytest.raises(CheckpointError, match="no name of a folder"):
        find_pipeline(copy)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"num_layers": 10**9}, "more than 3,000 layers"),
        ({"ffn_dim": 10**12}, "parameters, its weights hold"),
        ({"num_attention_heads": 10**5}, "parameters, its weights hold"),
    ],
)
def test_a_configuration_is_bounded_before_memory_is(
    copy: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, int], said: str
) -> None:
    monkeypatch.setattr(bounded_networks, "MAX_MODULES", 3_000)  # to be there sooner
    config = copy / "transformer" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), **changes}))
    folder = find_pipeline(copy)
    for work in (lambda: empty_modules(folder), lambda: load_pipeline(folder)):
        with pytest.raises(CheckpointError, match=said) as caught:
            work()
        assert caught.value.fix


def test_a_text_encoder_of_a_billion_layers_is_refused(
    copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bounded_networks, "MAX_MODULES", 3_000)
    config = copy / "text_encoder" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "num_layers": 10**9}))
    with pytest.raises(CheckpointError) as caught:
        load_pipeline(find_pipeline(copy))
    assert caught.value.fix


class Code:
    def __reduce__(self) -> Any:
        return os.mkdir, ("ran",)


@pytest.mark.parametrize("kind", ["code", "damaged", "meta"])
def test_a_pickle_of_a_text_encoder_is_our_error(
    copy: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.chdir(copy)
    (copy / "text_encoder" / "model.safetensors").unlink()
    file = copy / "text_encoder" / "pytorch_model.bin"
    state = {"code": {"a": Code()}, "meta": {"a.weight": torch.empty(2, device="meta")}}
    torch.save(state.get(kind, {"a": torch.ones(9)}), file)
    if kind == "damaged":
        file.write_bytes(file.read_bytes()[:-200])
    with pytest.raises(CheckpointError) as caught:
        load_pipeline(find_pipeline(copy, legacy=True), legacy=True)
    assert caught.value.fix and not (copy / "ran").exists()


def test_a_page_or_pointer_in_place_of_weights_is_named_before_anything_is_loaded(
    copy: Path,
) -> None:
    file = copy / "transformer" / "diffusion_pytorch_model.safetensors"
    file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n")
    with pytest.raises(CheckpointError, match="git-LFS pointer"):
        find_pipeline(copy)


@pytest.mark.parametrize(
    ("name", "variant"),
    {
        "model.safetensors": None,
        "model-00001-of-00002.safetensors": None,
        "model.fp16.safetensors": "fp16",
        "model.fp16-00001-of-00002.safetensors": "fp16",
        "model-00001-of-00002.fp16.safetensors": "fp16",
        "diffusion_pytorch_model.non_ema.bin": "non_ema",
    }.items(),
)
def test_a_variant_is_read_from_a_files_name(name: str, variant: str | None) -> None:
    assert variant_of(Path(name)) == variant


def test_a_variant_that_is_alone_is_loaded_without_being_asked_for(copy: Path) -> None:
    file = copy / "transformer" / "diffusion_pytorch_model.safetensors"
    file.rename(file.with_name("diffusion_pytorch_model.fp16.safetensors"))
    folder = find_pipeline(copy)
    assert len(folder.weights["transformer"]) == 1
    load_pipeline(folder)
