"""Rings of links, shards without their index, pages of text: named in every verb, never read."""

from __future__ import annotations

import json
import os
import struct

import pytest
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner

from motionmerge.cli import app
from motionmerge.errors import CheckpointError
from motionmerge.io.paths import behind_links
from motionmerge.io.weights import hash_weights, open_weights

W = torch.arange(6.0).reshape(2, 3)


def refused_in_every_verb(folder, name):
    """Use a name as every verb's input: exit code 2 with a fix, and nothing that was written."""
    save_file({"a.weight": W}, folder / "tuned.safetensors")
    recipe = folder / "r.yaml"
    recipe.write_text(
        f"inputs: {{base: {name}, tuned: tuned.safetensors}}\n"
        "experts: {m: base + 1.0 * (tuned - base), k: tuned}\n"
        "schedule: [{expert: m, above: 0.5}, {expert: k}]\n"
    )
    there, tuned, out = str(folder / name), str(folder / "tuned.safetensors"), str(folder / "out")
    verbs = {
        "show": [there],
        "compare": [there, tuned],
        "extrapolate": [there, tuned, "-o", out],
        "merge": [str(recipe), "-o", out],
        "merge --dry-run": [str(recipe), "-o", out],
        "export loras": [str(recipe), "-o", out],
        "export comfyui": [str(recipe), "-o", out],
        "export two-experts": [str(recipe), "-o", out, "--model", there],
        "convert": [there, "-o", out],
    }
    said = {}
    for verb, words in verbs.items():
        result = CliRunner().invoke(app, [*verb.split(), *words])
        assert result.exit_code == 2, (verb, result.output)
        assert "Fix:" in result.output
        said[verb] = " ".join(result.output.split())
    assert not [path for path in folder.rglob("*") if path.suffix == ".tmp"]
    return said


@pytest.mark.parametrize("ending", ["", ".safetensors", ".bin"])
def test_a_ring_of_links_is_refused_in_every_verb(tmp_path, ending):
    (tmp_path / f"one{ending}").symlink_to(f"two{ending}")
    (tmp_path / f"two{ending}").symlink_to(f"one{ending}")
    assert behind_links(tmp_path / f"one{ending}").parent == tmp_path
    said = refused_in_every_verb(tmp_path, f"one{ending}")
    assert all("link" in said[verb] for verb in ("show", "compare", "merge", "convert"))


@pytest.mark.parametrize("ring", [True, False])
@pytest.mark.parametrize("below", ["", "/below"])
@pytest.mark.parametrize("verb", ["merge", "extrapolate", "export loras", "export comfyui"])
def test_an_output_that_is_a_link_to_nowhere_is_refused(tmp_path, verb, below, ring):
    for name in ("base", "tuned"):
        save_file({"a.weight": W}, tmp_path / f"{name}.safetensors")
    (tmp_path / "r.yaml").write_text(
        "inputs: {base: base.safetensors, tuned: tuned.safetensors}\nexperts: {m: tuned}\n"
    )
    (tmp_path / "out").symlink_to("back" if ring else "gone/disk")
    (tmp_path / "back").symlink_to("out")
    words = [str(tmp_path / "r.yaml")]
    if verb == "extrapolate":
        words = [str(tmp_path / "base.safetensors"), str(tmp_path / "tuned.safetensors")]
    result = CliRunner().invoke(app, [*verb.split(), *words, "-o", f"{tmp_path}/out{below}"])
    assert result.exit_code == 2, result.output
    assert "is a link to" in " ".join(result.output.split())


@pytest.mark.parametrize("numbers", [(1,), (3,), (1, 3), (1, 2, 3)])
@pytest.mark.parametrize("variant", ["", ".fp16"])
def test_shards_without_an_index_are_no_model(tmp_path, numbers, variant):
    folder = tmp_path / "model"
    folder.mkdir()
    for number in numbers:
        save_file(
            {f"{number}.weight": W}, folder / f"model{variant}-0000{number}-of-00003.safetensors"
        )
    for work in (open_weights, hash_weights):
        with pytest.raises(CheckpointError, match="shards of a model of 3 and no index") as caught:
            work(folder)
        assert caught.value.fix


def test_the_only_shard_of_one_needs_no_index(tmp_path):
    save_file({"a.weight": W}, tmp_path / "model-00001-of-00001.safetensors")
    assert open_weights(tmp_path).keys() == ["a.weight"]


def test_a_shard_that_is_named_itself_is_read(tmp_path):
    path = tmp_path / "model-00001-of-00003.safetensors"
    save_file({"a.weight": W}, path)
    assert open_weights(path).keys() == ["a.weight"]


def test_a_link_in_a_folder_whose_target_is_gone_is_called_a_link(tmp_path):
    (tmp_path / "model.safetensors").symlink_to("../blobs/1234")
    for work in (open_weights, hash_weights):
        with pytest.raises(CheckpointError, match=r"a link to .*blobs/1234, which is not there"):
            work(tmp_path)


@pytest.mark.parametrize("ending", [".safetensors", ".bin", ".pt", ""])
@pytest.mark.parametrize(
    "text",
    [
        "Entry not found",
        "<Error><Code>AccessDenied</Code></Error>",
        "Invalid username or password.\n",
        "\n\n  429 Too Many Requests: ¡límite!",
        "oid sha256:abc\nsize 3\n" * 200,
    ],
)
@pytest.mark.parametrize("encoding", ["utf-8", "utf-16"])
def test_text_in_place_of_weights_is_called_text(tmp_path, text, ending, encoding):
    path = tmp_path / f"model{ending}"
    path.write_bytes(text.encode(encoding))
    with pytest.raises(CheckpointError, match=r"text|web page") as caught:
        open_weights(path)
    assert "damaged" not in caught.value.message


@pytest.mark.parametrize(
    "header",
    [
        {"a\ud800": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}},
        {
            "__metadata__": {"x\udfff": "y"},
            "a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]},
        },
        {
            "__metadata__": {"x": "\ud800"},
            "a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]},
        },
    ],
)
def test_a_name_that_no_file_can_hold_is_refused_where_it_is_read(tmp_path, header):
    text = json.dumps(header).encode()
    (tmp_path / "a.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + bytes(4))
    with pytest.raises(CheckpointError, match="surrogate"):
        open_weights(tmp_path / "a.safetensors")


def test_the_official_reader_refuses_such_names_too(tmp_path):
    from safetensors import SafetensorError, safe_open

    text = b'{"a\\ud800":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'
    (tmp_path / "a.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + bytes(4))
    with pytest.raises(SafetensorError):
        safe_open(os.fspath(tmp_path / "a.safetensors"), framework="pt")
