"""A copied folder stands on its own: its files are files, and editing it edits no source."""

from __future__ import annotations

import pytest

from motionmerge.errors import CheckpointError, ConfigError
from motionmerge.io.atomic import atomic_folder, check_new_folder
from motionmerge.io.folder_copy import copy_folder


@pytest.fixture
def cache(tmp_path):
    """A snapshot as the hub's cache has it: links to blobs without endings."""
    snapshot, blobs = tmp_path / "snapshot", tmp_path / "blobs"
    (snapshot / "vae").mkdir(parents=True)
    blobs.mkdir()
    for number, name in enumerate(("model_index.json", "vae/config.json", "vae/w.safetensors")):
        (blobs / str(number)).write_text(name)
        (blobs / str(number)).chmod(0o444)
        (snapshot / name).symlink_to(blobs / str(number))
    return snapshot


def test_links_become_files_weights_are_shared_and_all_else_is_its_own(cache, tmp_path):
    copy_folder(cache, tmp_path / "copy")
    copied = {path.name: path for path in (tmp_path / "copy").rglob("*") if path.is_file()}
    assert set(copied) == {"model_index.json", "config.json", "w.safetensors"}
    assert not any(path.is_symlink() for path in copied.values())
    assert copied["w.safetensors"].samefile(cache / "vae/w.safetensors")
    copied["config.json"].write_text("edited")
    assert (cache / "vae/config.json").read_text() == "vae/config.json"


def test_links_to_folders_are_followed_and_rings_are_not(cache, tmp_path):
    (cache / "again").symlink_to(cache / "vae")
    (cache / "vae/ring").symlink_to(cache)
    copy_folder(cache, tmp_path / "copy", leave_out=lambda path: path.suffix == ".safetensors")
    names = {p.relative_to(tmp_path / "copy").as_posix() for p in (tmp_path / "copy").rglob("*.*")}
    assert "model_index.json" in names and len(names) <= 3


def test_a_broken_link_is_an_error(cache, tmp_path):
    (tmp_path / "blobs/1").unlink()
    with pytest.raises(CheckpointError, match=r"config\.json.*\n.*Fix"):
        copy_folder(cache, tmp_path / "copy")


def test_only_an_earlier_result_is_replaced(tmp_path):
    target = tmp_path / "out"
    check_new_folder(target, overwrite=False, marker="model_index.json")
    target.mkdir()
    check_new_folder(target, overwrite=False, marker="model_index.json")
    (target / "thesis.doc").touch()
    with pytest.raises(ConfigError, match="exists already"):
        check_new_folder(target, overwrite=False, marker="model_index.json")
    with pytest.raises(ConfigError, match="other things"):
        check_new_folder(target, overwrite=True, marker="model_index.json")
    (target / "model_index.json").touch()
    check_new_folder(target, overwrite=True, marker="model_index.json")


@pytest.mark.parametrize("result", ["models", "models/base", "models/base/out"])
def test_a_result_never_replaces_what_it_is_made_from(tmp_path, result):
    (tmp_path / "models/base").mkdir(parents=True)
    with pytest.raises(ConfigError, match="lie in each other"):
        check_new_folder(
            tmp_path / result, overwrite=True, marker="x", keep=[tmp_path / "models/base"]
        )


def test_a_link_to_a_folder_stays_a_link(tmp_path):
    (tmp_path / "disk/out").mkdir(parents=True)
    (tmp_path / "out").symlink_to(tmp_path / "disk/out")
    with atomic_folder(tmp_path / "out") as folder:
        (folder / "new").touch()
    assert (tmp_path / "out").is_symlink() and (tmp_path / "disk/out/new").is_file()
