"""A photo is opened as one of a few formats, whatever it is called, and nothing else is started."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from PIL import EpsImagePlugin, Image

from motionmerge.errors import DataError
from motionmerge.io import video
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


# HEIC, which needs a package that not everybody has


def test_heic_without_pillow_heif_is_refused_by_name(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    (tmp_path / "photo.jpg").write_bytes(b"\0\0\0\x18ftypheic" + bytes(64))
    with pytest.raises(DataError, match=r"(?s)HEIC.*pillow-heif.*Fix: .*pip install pillow-heif"):
        load_image(tmp_path / "photo.jpg")


@pytest.fixture
def heic(tmp_path):
    """Write an image as HEIC, and return its path."""
    encoder = pytest.importorskip("pillow_heif")

    def write(image, **options):
        path = tmp_path / "photo.heic"
        encoder.encode(image.mode, image.size, image.tobytes(), path, quality=95, **options)
        return path

    return write


def test_a_heic_photo_is_read_upright(heic):
    image = Image.new("RGB", (64, 32), "blue")
    image.paste("red", (0, 0, 32, 32))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees: what is left goes to the top
    read = load_image(heic(image, exif=exif.tobytes()))
    assert (read.mode, read.size) == ("RGB", (32, 64))
    assert read.getpixel((16, 8))[0] > 200
    assert read.getpixel((16, 56))[2] > 200


def test_transparent_heic_lies_over_white(heic):
    read = load_image(heic(Image.new("RGBA", (32, 32), (255, 0, 0, 0))))
    assert min(read.getpixel((16, 16))) > 250


def test_hostile_heic_is_refused(heic, monkeypatch):
    path = heic(Image.effect_noise((64, 64), 50).convert("RGB"))
    whole = path.read_bytes()
    for damaged in (whole[: len(whole) // 2], whole[:40] + bytes(len(whole) - 40)):
        path.write_bytes(damaged)
        with pytest.raises(DataError, match="Fix"):
            load_image(path)
    path.write_bytes(whole)
    monkeypatch.setattr(video, "MAX_IMAGE_PIXELS", 1_000)
    with pytest.raises(DataError, match="Scale the image down"):
        load_image(path)


def test_reading_heic_registers_nothing_with_pillow(heic):
    load_image(heic(Image.new("RGB", (32, 32), "red")))
    assert "HEIF" not in Image.OPEN
