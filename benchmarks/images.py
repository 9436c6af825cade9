"""Photographs as model input, prepared as timm's eval transform does, and read without trusting the files."""

import importlib.util
import math
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

MAX_PIXELS = 50_000_000
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm")
_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM")  # no format that hands the file to another program
_SHOWN = 5


class ImageError(ValueError):
    """One line per file that cannot be used, or one line about the directory."""


def photographs() -> list[Path]:
    """The two photographs that scikit-learn ships (`china.jpg`, `flower.jpg`, CC-BY).

    Raises:
        ImageError: scikit-learn, which carries them, is not installed.
    """
    spec = importlib.util.find_spec("sklearn")  # found, not imported: importing it costs a second
    if spec is None or spec.origin is None:
        raise ImageError(
            'no default photographs: install them with  pip install "fastvit[bench]"  or pass --images DIR'
        )
    folder = Path(spec.origin).parent / "datasets" / "images"
    paths = [folder / "china.jpg", folder / "flower.jpg"]
    if not all(path.is_file() for path in paths):
        raise ImageError(f"scikit-learn's photographs are missing in {folder}: pass --images DIR")
    return paths


def list_images(directory: str | Path) -> list[Path]:
    """The image files directly inside `directory`, by suffix, sorted by name.

    Raises:
        ImageError: it does not exist, is no directory, cannot be listed, or holds no image.
    """
    folder = Path(directory)
    if not folder.exists():
        raise ImageError(f"{folder}: no such directory")
    if not folder.is_dir():
        raise ImageError(f"{folder}: not a directory")
    try:
        paths = sorted(path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES)
    except OSError as error:
        raise ImageError(f"{folder}: {error.strerror}") from None
    if not paths:
        raise ImageError(f"{folder}: no images in this directory (looked for *{', *'.join(SUFFIXES)})")
    return paths


def load(
    paths: Sequence[Path], size: int, crop_pct: float, mean: Sequence[float], std: Sequence[float]
) -> torch.Tensor:
    """Read, resize, crop and normalise image files.

    Args:
        paths: image files.
        size: side of the square the model sees, in pixels.
        crop_pct: share of the resized image's shorter side that the crop keeps.
        mean, std: three numbers each, for pixels in 0..1.

    Returns:
        fp32 (len(paths), 3, size, size).

    Raises:
        ImageError: one line for each file that cannot be read.
    """
    pixels, failures = [], []
    for path in paths:
        try:
            pixels.append(transform(read_rgb(path), size, crop_pct, mean, std))
        except ImageError as error:
            failures.append(str(error))
    if failures:
        hidden = len(failures) - _SHOWN
        raise ImageError("\n".join(failures[:_SHOWN] + ([f"... and {hidden} more files"] if hidden > 0 else [])))
    return torch.stack(pixels)


def read_rgb(path: Path):
    """Read one image file as an upright 8-bit RGB PIL image; the first frame of an animation.

    As in timm, transparency is dropped. 16-bit greyscale is scaled to 8 bits (PIL alone would clip it).

    Raises:
        ImageError: not a regular file, empty, unreadable, truncated, too large, or of a mode that has no fixed range.
    """
    from PIL import Image, ImageOps

    if not path.is_file():
        raise ImageError(f"{path}: not a regular file")
    try:
        if path.stat().st_size == 0:
            raise ImageError(f"{path}: the file is empty")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PIL's own size warning: the cap below is lower
            with Image.open(path, formats=_FORMATS) as image:
                width, height = image.size
                if width * height > MAX_PIXELS:
                    raise ImageError(f"{path}: {width} x {height} pixels, more than the {MAX_PIXELS:,} allowed")
                return _to_rgb(ImageOps.exif_transpose(image), path)
    except ImageError:
        raise
    except Image.DecompressionBombError:
        raise ImageError(f"{path}: more than the {MAX_PIXELS:,} pixels allowed") from None
    except Image.UnidentifiedImageError:
        raise ImageError(f"{path}: not an image that can be read (accepted: {', '.join(_FORMATS)})") from None
    except Exception as error:  # decoders raise OSError, SyntaxError, ValueError, struct.error, IndexError ...
        raise ImageError(
            f"{path}: unreadable or truncated ({str(error).splitlines()[0] if str(error) else error!r})"
        ) from None


def _to_rgb(image, path: Path):
    from PIL import Image

    if image.mode == "F":
        raise ImageError(f"{path}: floating-point pixels have no fixed range; save it with 8 bits per channel")
    if image.mode.startswith("I"):
        grey = np.asarray(image, dtype=np.int64)
        if grey.min() < 0 or grey.max() > 65535:
            raise ImageError(f"{path}: 32-bit pixels have no fixed range; save it with 8 bits per channel")
        image = Image.fromarray(((grey + 128) // 257).astype(np.uint8))
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    return image.convert("RGB")


def transform(image, size: int, crop_pct: float, mean: Sequence[float], std: Sequence[float]) -> torch.Tensor:
    """Shorter side to floor(size / crop_pct) by antialiased bicubic, centre crop, normalise.

    Returns fp32 (3, size, size), equal to `timm.data.create_transform(size, crop_pct=..., interpolation="bicubic")`.
    """
    from PIL import Image

    short = math.floor(size / crop_pct)
    width, height = image.size
    if width <= height:
        scaled = (short, int(short * height / width))
    else:
        scaled = (int(short * width / height), short)
    if scaled != (width, height):
        image = image.resize(scaled, Image.Resampling.BICUBIC)
    left, top = round((scaled[0] - size) / 2), round((scaled[1] - size) / 2)
    image = image.crop((left, top, left + size, top + size))
    pixels = torch.from_numpy(np.array(image, dtype=np.uint8)).permute(2, 0, 1).float() / 255
    return (pixels - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
