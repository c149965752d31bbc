"""A photo is opened as one of a few formats, whatever it is called, and nothing else is started."""

from __future__ import annotations

import os
import subprocess

import pytest
from PIL import EpsImagePlugin, Image

from motionmerge.errors import DataError
from motionmerge.io.video import IMAGE_FORMATS, load_image

POSTSCRIPT = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 64 64\n%%EndComments\n{} loop\n%%EOF\n"


@pytest.mark.parametrize("name", ["photo.jpg", "photo.png", "photo.eps", "photo"])
def test_postscript_is_refused_and_ghostscript_not_started(tmp_path, monkeypatch, name):
    def started(*_, **__):
        raise AssertionError("a program was started")

    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", started)
    monkeypatch.setattr(subprocess, "check_call", started)
    (tmp_path / name).write_bytes(POSTSCRIPT)
    with pytest.raises(DataError, match=r"none of JPEG.*\n.*Fix"):
        load_image(tmp_path / name)


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM", "TGA"])
def test_the_usual_formats_are_opened_under_any_name(tmp_path, form):
    assert form in IMAGE_FORMATS
    Image.new("RGB", (32, 24), "red").save(tmp_path / "photo.dat", format=form)
    assert load_image(tmp_path / "photo.dat").size == (32, 24)


@pytest.mark.parametrize("form", ["PDF", "ICO", "PCX", "SGI"])
def test_other_formats_are_refused(tmp_path, form):
    Image.new("RGB", (32, 32), "red").save(tmp_path / "photo.png", format=form)
    with pytest.raises(DataError, match="Fix"):
        load_image(tmp_path / "photo.png")


def test_a_pipe_or_device_is_no_photo(tmp_path):
    os.mkfifo(tmp_path / "photo.jpg")
    for path in (tmp_path / "photo.jpg", "/dev/zero", tmp_path):
        with pytest.raises(DataError, match="Fix"):
            load_image(path)


def test_a_file_of_gigabytes_is_refused_by_its_size(tmp_path):
    path = tmp_path / "photo.webp"
    with path.open("wb") as file:
        file.write(b"RIFF")
        file.truncate(2**40)
    with pytest.raises(DataError, match=r"bytes, more than"):
        load_image(path)
