"""Photos of every kind become RGB; videos come back as they went in, with their metadata."""

from __future__ import annotations

from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image, features

from motionmerge.errors import DataError, ShapeError
from motionmerge.io.video import (
    contact_sheet,
    eight_bit,
    fit_image,
    load_image,
    read_video,
    read_video_metadata,
    write_video,
)


@pytest.fixture
def video():
    """Three frames of smooth colour, `[3, 3, 32, 48]`."""
    y = torch.linspace(0, 1, 32).view(1, 32, 1).expand(3, 32, 48)
    x = torch.linspace(0, 1, 48).view(1, 1, 48).expand(3, 32, 48)
    t = torch.linspace(0, 1, 3).view(3, 1, 1).expand(3, 32, 48)
    return torch.stack([x, y, t], dim=1)


def save(tmp_path, image, name="photo.png", **options):
    image.save(tmp_path / name, **options)
    return tmp_path / name


# Images


def test_exif_turns_the_photo_upright(tmp_path):
    image = Image.new("RGB", (32, 16), "red")
    exif = Image.Exif()
    exif[0x0112] = 6
    assert load_image(save(tmp_path, image, "photo.jpg", exif=exif)).size == (16, 32)


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_what_is_transparent_becomes_white(tmp_path, mode):
    clear = Image.new("RGBA", (16, 16), (0, 0, 0, 0)).convert(mode)
    image = load_image(save(tmp_path, clear))
    assert image.mode == "RGB"
    assert image.getpixel((3, 3)) == (255, 255, 255)


def test_a_transparent_palette_colour_becomes_white(tmp_path):
    image = Image.new("P", (16, 16), 0)
    image.putpalette([255, 0, 0, 0, 255, 0])
    assert load_image(save(tmp_path, image, transparency=0)).getpixel((3, 3)) == (255, 255, 255)


def test_sixteen_bits_are_scaled_to_eight(tmp_path):
    values = np.linspace(0, 65535, 256, dtype=np.uint16).reshape(16, 16)
    read = np.asarray(load_image(save(tmp_path, Image.fromarray(values))))
    assert np.array_equal(read[..., 0], np.arange(256).reshape(16, 16))
    assert np.array_equal(read[..., 0], read[..., 2])


@pytest.mark.parametrize("mode", ["1", "L", "P", "CMYK", "RGB"])
def test_every_common_mode_becomes_rgb(tmp_path, mode):
    name = "photo.tiff" if mode == "CMYK" else "photo.png"
    image = load_image(save(tmp_path, Image.new("RGB", (16, 16), "white").convert(mode), name))
    assert image.mode == "RGB"
    assert image.getpixel((3, 3)) == (255, 255, 255)


def test_bad_images_are_refused_with_a_fix(tmp_path):
    (tmp_path / "text.png").write_text("hello")
    whole = save(tmp_path, Image.effect_noise((64, 64), 50)).read_bytes()
    (tmp_path / "half.png").write_bytes(whole[: len(whole) // 2])
    save(tmp_path, Image.new("RGB", (64, 2)), "thin.png")
    save(tmp_path, Image.new("F", (16, 16)), "float.tiff")
    for name in ("text.png", "half.png", "thin.png", "float.tiff", "missing.png", "."):
        with pytest.raises(DataError, match="Fix"):
            load_image(tmp_path / name)


@pytest.mark.parametrize("ending", ["dds", "avif"])
def test_a_damaged_image_of_a_rare_format_is_refused_with_a_fix(tmp_path, ending):
    if not features.check("avif") and ending == "avif":
        pytest.skip("Pillow was built without AVIF")
    path = save(tmp_path, Image.effect_noise((64, 64), 50).convert("RGB"), f"photo.{ending}")
    whole = bytearray(path.read_bytes())
    if ending == "dds":
        whole[80:84] = (8192).to_bytes(4, "little")  # flags of a pixel format that there is not
    else:
        start = whole.index(b"mdat") + 4
        whole[start:] = bytes(len(whole) - start)
    path.write_bytes(whole)
    with pytest.raises(DataError, match="cannot be read as an image"):
        load_image(path)


def test_a_huge_image_is_refused_before_it_is_decoded(tmp_path):
    path = save(tmp_path, Image.new("1", (9_400, 9_500)))
    with pytest.raises(DataError, match="Scale the image down"):
        load_image(path)
    path = save(tmp_path, Image.new("1", (20_000, 11_000)))
    with pytest.raises(DataError, match="Scale the image down"):
        load_image(path)


def test_a_fitted_image_keeps_its_centre_and_its_proportions():
    image = Image.new("RGB", (300, 100), "black")
    image.paste("white", (100, 0, 200, 100))
    fitted = fit_image(image, 64, 64)
    assert fitted.size == (64, 64)
    assert np.asarray(fitted)[:, 4:-4].min() > 250
    assert fit_image(image, 64, 192).size == (192, 64)


# Videos


def test_a_video_is_read_back_as_it_was(tmp_path, video):
    write_video(tmp_path / "new" / "x.mp4", video, fps=7.5, scale=2)
    read, fps = read_video(tmp_path / "new" / "x.mp4")
    assert fps == 7.5
    assert read.shape == (3, 3, 64, 96)
    assert read.dtype == torch.float32
    assert (read[:, :, ::2, ::2] - video).abs().mean() < 0.01


def test_colours_do_not_shift(tmp_path):
    for colour in ([1.0, 0, 0], [0, 1.0, 0], [0, 0, 1.0], [1.0, 1.0, 1.0], [0.5, 0.3, 0.7]):
        video = torch.tensor(colour).view(1, 3, 1, 1).expand(2, 3, 32, 32)
        write_video(tmp_path / "x.mp4", video)
        read, _ = read_video(tmp_path / "x.mp4")
        assert (read - video).abs().max() < 0.02


def test_the_file_is_what_players_expect(tmp_path, video):
    write_video(tmp_path / "x.mp4", video)
    with av.open(str(tmp_path / "x.mp4")) as container:
        stream = container.streams.video[0]
        assert stream.codec_context.name == "h264"
        assert stream.codec_context.pix_fmt == "yuv420p"


def test_the_same_video_gives_the_same_bytes(tmp_path, video):
    for name in "ab":
        write_video(tmp_path / f"{name}.mp4", video, metadata={"seed": 0})
    assert (tmp_path / "a.mp4").read_bytes() == (tmp_path / "b.mp4").read_bytes()


def test_bytes_and_floats_give_the_same_file(tmp_path, video):
    write_video(tmp_path / "a.mp4", video)
    eight_bit = (video * 255).round().to(torch.uint8).permute(0, 2, 3, 1)
    write_video(tmp_path / "b.mp4", eight_bit.numpy())
    assert (tmp_path / "a.mp4").read_bytes() == (tmp_path / "b.mp4").read_bytes()


@pytest.mark.parametrize("name", ["take:2.mp4", "http:", "concat:a|b", "-i", "a b#c?d.mp4", "é%d"])
def test_a_name_that_ffmpeg_might_take_for_an_address_is_a_file(tmp_path, monkeypatch, video, name):
    monkeypatch.chdir(tmp_path)
    write_video(name, video, fps=8, metadata={"seed": 1})
    assert [path.name for path in tmp_path.iterdir()] == [name]
    assert read_video(Path(name))[0].shape == video.shape
    assert read_video_metadata(name) == {"seed": 1}


def test_odd_sizes_are_padded_by_one(tmp_path, video):
    write_video(tmp_path / "x.mp4", video[:, :, :31, :47])
    assert read_video(tmp_path / "x.mp4")[0].shape == (3, 3, 32, 48)


def test_metadata_is_kept(tmp_path, video):
    metadata = {"prompt": "Die Kamera schwenkt; = \\ #\nlinks", "seed": 3, "recipe": {"a": [1]}}
    write_video(tmp_path / "x.mp4", video, metadata=metadata)
    assert read_video_metadata(tmp_path / "x.mp4") == metadata


def test_a_prompt_that_is_no_utf_8_and_values_unknown_to_json_do_not_lose_the_video(
    tmp_path, video
):
    metadata = {"prompt": "caf\udce9 \U0001f3a5 \\udce9"}
    write_video(tmp_path / "x.mp4", video, metadata={**metadata, "weights": tmp_path})
    assert read_video_metadata(tmp_path / "x.mp4") == {**metadata, "weights": str(tmp_path)}


def test_a_video_without_our_metadata_is_refused(tmp_path, video):
    write_video(tmp_path / "x.mp4", video)
    with pytest.raises(DataError, match="does not say how it was made"):
        read_video_metadata(tmp_path / "x.mp4")


@pytest.mark.parametrize(
    "bad",
    [torch.zeros(3, 32, 32), torch.zeros(2, 4, 32, 32), torch.zeros(0, 3, 32, 32),
     torch.zeros(2, 3, 32, 32, dtype=torch.uint8), torch.zeros(2, 3, 32, 32, dtype=torch.int64)],
)  # fmt: skip
def test_what_is_not_a_video_is_not_written(tmp_path, bad):
    with pytest.raises(ShapeError, match="Fix"):
        write_video(tmp_path / "x.mp4", bad)
    assert not list(tmp_path.iterdir())


def test_nan_pixels_are_refused(tmp_path, video):
    with pytest.raises(DataError, match="NaN"):
        write_video(tmp_path / "x.mp4", video * float("nan"))


def test_values_outside_0_to_1_are_clipped(tmp_path, video):
    write_video(tmp_path / "x.mp4", video * 4 - 1)
    read, _ = read_video(tmp_path / "x.mp4")
    assert read.min() >= 0 and read.max() <= 1


def test_bad_files_are_refused_with_a_fix(tmp_path, video):
    (tmp_path / "text.mp4").write_text("hello")
    (tmp_path / "empty.mp4").write_bytes(b"")
    for name in ("text.mp4", "empty.mp4", "missing.mp4"):
        with pytest.raises(DataError, match="Fix"):
            read_video(tmp_path / name)
        with pytest.raises(DataError, match="Fix"):
            read_video_metadata(tmp_path / name)


def test_a_contact_sheet_has_a_row_per_video_and_a_column_per_frame(tmp_path, video):
    sheet = contact_sheet([video, video], labels=["base", "tuned"], path=tmp_path / "sheet.png")
    assert sheet.size == (3 * 50 + 2, 2 * (32 + 14 + 2) + 2)
    assert Image.open(tmp_path / "sheet.png").size == sheet.size
    assert contact_sheet([video], every=2).size == (2 * 50 + 2, 36)


def test_labels_of_a_contact_sheet_are_legible_or_escaped_but_no_boxes(video):
    image = contact_sheet([video] * 3, labels=["a cat", "猫跳", "\u0378\udce9"])
    assert image == contact_sheet([video] * 3, labels=["a cat", "猫跳", r"\u0378\udce9"])
    missing = "\U0010fffe"  # no font has it: it is drawn as a box
    boxes = contact_sheet([video], labels=[missing * 2])
    assert contact_sheet([video], labels=["猫跳"]) != boxes
    assert boxes == contact_sheet([video], labels=[r"\U0010fffe" * 2])


def test_a_contact_sheet_of_eight_bits_is_that_of_floats(video):
    assert contact_sheet([eight_bit(video)]) == contact_sheet([video])


def test_a_contact_sheet_that_cannot_be_written_is_an_error_with_a_fix(tmp_path, video):
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    for path in (tmp_path / "folder", tmp_path / "file" / "sheet.png"):
        with pytest.raises(DataError, match=r"Cannot write(.|\n)*Fix"):
            contact_sheet([video], path=path)


def test_videos_of_different_sizes_do_not_make_a_sheet(video):
    for videos, labels in [([], None), ([video, video[..., 1:]], None), ([video], ["a", "b"])]:
        with pytest.raises(ShapeError, match="Fix"):
            contact_sheet(videos, labels=labels)


def test_equal_videos_give_equal_files_whatever_the_memory_held_before(tmp_path):
    video = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(0)).cumsum(0) / 4
    written = []
    for attempt in range(4):
        dirt = [torch.rand(5000 + 997 * attempt) for _ in range(20)]
        write_video(tmp_path / "video.mp4", video)
        written.append((tmp_path / "video.mp4").read_bytes())
        del dirt
    assert len(set(written)) == 1
