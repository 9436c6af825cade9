"""Image files: unusual ones give the right pixels, unusable ones one line, and the pixels are timm's."""

import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fastvit import images
from fastvit.benchmarks import images as photographs, peers

MEAN_STD = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)


def photo(width: int = 90, height: int = 60, mode: str = "RGB") -> Image.Image:
    values = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(values).convert(mode)


@pytest.mark.parity
@pytest.mark.parametrize(("size", "crop_pct"), [(224, 0.9), (384, 1.0), (518, 1.0), (32, 0.875)])
def test_the_transform_is_timms(size: int, crop_pct: float) -> None:
    timm, reason = peers.import_timm()
    assert timm is not None, reason
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    theirs = timm.data.create_transform(
        (3, size, size), is_training=False, interpolation="bicubic", crop_pct=crop_pct, mean=mean, std=std
    )
    pictures = [images.read_rgb(path) for path in photographs.photographs()]
    pictures += [photo(), photo(61, 97), photo(40, 40), photo(41, 300)]
    for picture in pictures:
        ours = images.Preprocessing.of_timm(size, crop_pct, mean, std)(picture)
        torch.testing.assert_close(ours, theirs(picture), rtol=0, atol=1e-6)


def test_photographs_load_as_a_batch() -> None:
    paths = photographs.photographs()
    batch = photographs.load(paths, 224, 0.9, *MEAN_STD)
    assert batch.shape == (2, 3, 224, 224)
    assert batch.dtype == torch.float32
    assert -1 <= batch.min() < -0.9
    assert 0.9 < batch.max() <= 1


def test_unusual_images_give_the_right_pixels(tmp_path: Path) -> None:
    plain = np.asarray(photo())
    photo().save(tmp_path / "plain.png")
    rotated, exif = photo().transpose(Image.Transpose.ROTATE_90), Image.Exif()
    exif[0x0112] = 6  # shown upright after a quarter turn clockwise
    rotated.save(tmp_path / "rotated.png", exif=exif)
    alpha = photo().convert("RGBA")
    alpha.putalpha(128)
    alpha.save(tmp_path / "alpha.png")
    photo().save(tmp_path / "animated.gif", save_all=True, append_images=[photo().rotate(180)])
    for name in ("plain.png", "rotated.png", "alpha.png"):
        assert np.array_equal(np.asarray(images.read_rgb(tmp_path / name)), plain), name
    with Image.open(tmp_path / "animated.gif") as animation:
        first = np.asarray(animation.convert("RGB"))
    assert np.array_equal(np.asarray(images.read_rgb(tmp_path / "animated.gif")), first)


def test_other_modes_become_rgb(tmp_path: Path) -> None:
    photo(mode="CMYK").save(tmp_path / "cmyk.jpg", quality=100, subsampling=0)
    got = np.asarray(images.read_rgb(tmp_path / "cmyk.jpg")).astype(int)
    assert np.abs(got - np.asarray(photo())).mean() < 3
    grey = np.linspace(0, 65535, 60 * 90).astype(np.uint16).reshape(60, 90)
    Image.fromarray(grey).save(tmp_path / "deep.png")
    got = np.asarray(images.read_rgb(tmp_path / "deep.png"))
    assert np.abs(got[..., 0] - grey / 257.0).max() <= 0.5
    palette = photo().quantize(16)
    palette.info["transparency"] = 0
    palette.save(tmp_path / "palette.png", transparency=0)
    photo(mode="1").save(tmp_path / "bits.tif")
    for name in ("palette.png", "bits.tif"):
        assert images.read_rgb(tmp_path / name).mode == "RGB"


def png_without_pixels(width: int, height: int) -> bytes:
    body = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    header = struct.pack(">I", 13) + body + struct.pack(">I", zlib.crc32(body))
    return b"\x89PNG\r\n\x1a\n" + header + struct.pack(">I", 1000) + b"IDAT"


def test_unusable_images_give_one_line_each(tmp_path: Path) -> None:
    photo(300, 200).save(tmp_path / "good.jpg")
    whole = (tmp_path / "good.jpg").read_bytes()
    expected = {
        "cut.jpg": (whole[: len(whole) // 2], "truncated"),
        "empty.png": (b"", "empty"),
        "text.png": (b"hello\n" * 100, "not an image"),
        "huge.png": (png_without_pixels(8000, 8000), "64,000,000|8000 x 8000"),
        "bomb.png": (png_without_pixels(60000, 60000), "50,000,000"),
        "header.png": (png_without_pixels(8, 8), "truncated"),
    }
    for name, (content, _) in expected.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(images.ImageError, match=rf"^.*{name}: .*({expected[name][1]})") as caught:
            photographs.load([tmp_path / "good.jpg", tmp_path / name], 32, 0.9, *MEAN_STD)
        assert "\n" not in str(caught.value)
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "broken.png").symlink_to(tmp_path / "nowhere")
    Image.fromarray(np.zeros((4, 4), np.float32)).save(tmp_path / "float.tif")
    for name, reason in (("folder.png", "regular"), ("broken.png", "regular"), ("float.tif", "fixed range")):
        with pytest.raises(images.ImageError, match=reason):
            images.read_rgb(tmp_path / name)
    with pytest.raises(images.ImageError) as caught:
        photographs.load(images.list_images(tmp_path), 32, 0.9, *MEAN_STD)
    assert str(caught.value).count("\n") == photographs._SHOWN
    assert str(caught.value).endswith("... and 4 more files")


def test_directories_are_checked(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("no image")
    for path, reason in (
        (tmp_path / "none", "no such"),
        (tmp_path / "notes.txt", "not a dir"),
        (tmp_path, "no images"),
    ):
        with pytest.raises(images.ImageError, match=reason):
            images.list_images(path)
    for name in ("b.PNG", "a.jpeg"):
        (tmp_path / name).write_bytes(b"x")
    assert [path.name for path in images.list_images(tmp_path)] == ["a.jpeg", "b.PNG"]
