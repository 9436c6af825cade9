"""Image files as model input: read without trusting them, prepared as timm or transformers does."""

import glob
import math
import os
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

try:
    import numpy as np
    from PIL import Image, ImageOps
except ImportError as missing:
    raise ImportError(
        f'fastvit.images: images need pillow and numpy ({missing}); install them with: pip install "fastvit[cli]"',
        name=missing.name,
    ) from None

MAX_PIXELS = 50_000_000
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm")
_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM")  # no format that hands the file to another program
_BY_SHORT_EDGE = ("CLIP", "Bit", "ChineseCLIP", "ConvNext", "Levit", "MobileNet")  # what a size of one number is

Numbers = float | Sequence[float]


class ImageError(ValueError):
    """One line about a file or a directory that cannot be used."""


def find_images(names: Iterable[str | Path], recursive: bool = False) -> Iterator[Path | ImageError]:
    """The image files behind files, directories and glob patterns, in that order, each once.

    A directory gives what :func:`list_images` finds; a pattern what it matches and has an image's suffix. A name that
    leads to no image gives an error in its place. ``recursive``: directories with all that is below them.
    """
    seen = set()
    for name in names:
        for found in _behind(str(name), recursive):
            if isinstance(found, ImageError):
                yield found
            elif found not in seen:
                seen.add(found)
                yield found


def _behind(name: str, recursive: bool) -> Sequence[Path | ImageError]:
    path = Path(name)
    try:
        if path.is_dir():
            return list_images(path, recursive)
        if path.exists() or path.is_symlink() or not glob.has_magic(name):
            return [path if path.exists() or path.is_symlink() else ImageError(f"{path}: no such file or directory")]
        matched = sorted(Path(match) for match in glob.iglob(name, recursive=True))
        images = [match for match in matched if match.suffix.lower() in SUFFIXES and not match.is_dir()]
        return images or [ImageError(f"{name}: the pattern matches no image (looked for *{', *'.join(SUFFIXES)})")]
    except ImageError as error:
        return [error]
    except (OSError, ValueError) as error:  # a name too long, or with a null character
        return [ImageError(f"{name}: {getattr(error, 'strerror', None) or error}")]


def list_images(directory: str | Path, recursive: bool = False) -> list[Path]:
    """The image files directly inside `directory`, by suffix, sorted by name; or all below it, links not followed.

    Raises:
        ImageError: it does not exist, is no directory, cannot be listed, or holds no image.
    """
    folder = Path(directory)
    if not folder.exists():
        raise ImageError(f"{folder}: no such directory")
    if not folder.is_dir():
        raise ImageError(f"{folder}: not a directory")
    try:
        inside = _walk(folder) if recursive else folder.iterdir()
        paths = sorted(path for path in inside if path.suffix.lower() in SUFFIXES)
    except OSError as error:
        raise ImageError(f"{error.filename or folder}: {error.strerror}") from None
    if not paths:
        where = "in or below" if recursive else "in"
        raise ImageError(f"{folder}: no images {where} this directory (looked for *{', *'.join(SUFFIXES)})")
    return paths


def _walk(folder: Path) -> Iterator[Path]:
    def refuse(error: OSError) -> None:
        raise error  # a folder that cannot be listed is not silently an empty one

    for place, _, names in os.walk(folder, onerror=refuse):
        yield from (Path(place, name) for name in names)


def read_rgb(path: Path) -> Image.Image:
    """Read one image file as an upright 8-bit RGB PIL image; the first frame of an animation.

    As in timm, transparency is dropped. 16-bit greyscale is scaled to 8 bits (PIL alone would clip it).

    Raises:
        ImageError: not a regular file, empty, unreadable, truncated, too large, or of a mode that has no fixed range.
    """
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


def _to_rgb(image: Image.Image, path: Path) -> Image.Image:
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


@dataclass(frozen=True)
class Preprocessing:
    """How an RGB image becomes what a model sees; calling it with a PIL image gives fp32 (3, height, width).

    resize: the shorter side in pixels, or (height, width) whatever the proportions, or None. crop: (height, width) cut
    from the centre, with black where the image is smaller, or None. mean, std: of each channel, for pixels divided by
    ``divisor``. resample: the name of PIL's filter, antialiased. An odd margin of the crop is split as
    torchvision does, which timm calls, or ``odd_margin_down`` as transformers does.
    """

    resize: int | tuple[int, int] | None
    crop: tuple[int, int] | None
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    resample: str = "bicubic"
    divisor: float = 255.0
    odd_margin_down: bool = False

    @classmethod
    def of_timm(
        cls, size: int, crop_pct: float, mean: Numbers, std: Numbers, resample: str = "bicubic"
    ) -> "Preprocessing":
        """Shorter side to floor(size / crop_pct), centre crop: `timm.data.create_transform` for evaluation."""
        return cls(math.floor(size / crop_pct), (size, size), _three(mean), _three(std), resample)

    @classmethod
    def of_transformers(cls, config: Mapping[str, Any]) -> "Preprocessing":
        """What a `preprocessor_config.json` of transformers asks for.

        Raises:
            ValueError: a size, a filter, a mean or a deviation that means nothing.
        """
        name = str(config.get("image_processor_type") or config.get("feature_extractor_type") or "")
        square = not name.startswith(_BY_SHORT_EDGE)
        resize = _size(config.get("size", 224), square) if config.get("do_resize", True) else None
        crop = None
        if config.get("do_center_crop", False):
            cut = _size(config.get("crop_size", 224), True)
            crop = cut if isinstance(cut, tuple) else (cut, cut)
        resample = config.get("resample", 2)
        if resample not in range(6):
            raise ValueError(f"fastvit.images: resample must be one of PIL's filters, 0 to 5, got {resample!r}")
        normalised = config.get("do_normalize", True)
        return cls(
            resize,
            crop,
            _three(config.get("image_mean", 0.5) if normalised else 0.0),
            _positive(_three(config.get("image_std", 0.5) if normalised else 1.0)),
            Image.Resampling(resample).name.lower(),
            _divisor(config.get("rescale_factor", 1 / 255)) if config.get("do_rescale", True) else 1.0,
            odd_margin_down=True,
        )

    @property
    def size(self) -> tuple[int, int] | None:
        """(height, width) of what comes out; None where that depends on the image."""
        return self.crop or (self.resize if isinstance(self.resize, tuple) else None)

    def at(self, side: int) -> "Preprocessing":
        """The same for a square of another side; a crop keeps its share of the image."""
        if self.crop is None:
            return replace(self, resize=(side, side) if isinstance(self.resize, tuple) else side, crop=(side, side))
        if isinstance(self.resize, tuple):
            height, width = (max(side, round(side * r / c)) for r, c in zip(self.resize, self.crop, strict=True))
            return replace(self, resize=(height, width), crop=(side, side))
        short = side if self.resize is None else max(side, round(side * self.resize / min(self.crop)))
        return replace(self, resize=short, crop=(side, side))

    def __call__(self, image: Image.Image) -> torch.Tensor:
        return self.normalised(self.pixels(image))

    def pixels(self, image: Image.Image) -> torch.Tensor:
        """The picture that the model sees as uint8 (3, height, width): a quarter of the bytes to hand around."""
        return torch.from_numpy(np.array(self.picture(image), dtype=np.uint8)).permute(2, 0, 1)

    def normalised(self, pixels: torch.Tensor) -> torch.Tensor:
        """uint8 (..., 3, height, width) as the model's input, fp32 on the same device."""
        mean, std = (torch.tensor(n, device=pixels.device).view(3, 1, 1) for n in (self.mean, self.std))
        return (pixels.float() / self.divisor - mean) / std

    def picture(self, image: Image.Image) -> Image.Image:
        """The image resized and cropped: what the model sees, before it is normalised."""
        if self.resize is not None:
            height, width = self.resize if isinstance(self.resize, tuple) else _shorter_side(image.size, self.resize)
            if height * width > MAX_PIXELS:
                raise ImageError(f"{image.width} x {image.height} pixels are too elongated to be resized")
            if (width, height) != image.size:
                image = image.resize((width, height), Image.Resampling[self.resample.upper()])
        if self.crop is not None:
            height, width = self.crop
            rounded = int if self.odd_margin_down else round
            left, top = rounded((image.width - width) / 2), rounded((image.height - height) / 2)
            image = image.crop((left, top, left + width, top + height))
        return image

    def read(self, path: Path) -> torch.Tensor:
        """The model's input (3, height, width), fp32, from an image file.

        Raises:
            ImageError: one line, which begins with the path.
        """
        return self.normalised(self.read_pixels(path))

    def read_pixels(self, path: Path) -> torch.Tensor:
        """The same before it is normalised, uint8."""
        image = read_rgb(path)
        try:
            return self.pixels(image)
        except ImageError as error:
            raise ImageError(f"{path}: {error}") from None


def _shorter_side(size: tuple[int, int], short: int) -> tuple[int, int]:
    width, height = size
    return (int(short * height / width), short) if width <= height else (short, int(short * width / height))


def _size(value: Any, square: bool) -> int | tuple[int, int]:
    """transformers' size: a number or {"shortest_edge"} or {"height", "width"}."""
    if isinstance(value, Mapping):
        value = value.get("shortest_edge") or (value.get("height"), value.get("width"))
        square = False
    sides = tuple(value) if isinstance(value, (tuple, list)) else (value,)
    if len(sides) > 2 or not all(isinstance(side, int) and 0 < side <= 10_000 for side in sides):
        raise ValueError(f"fastvit.images: size must be one or two numbers of pixels, got {value!r}")
    return (sides[0], sides[-1]) if len(sides) == 2 or square else sides[0]


def _divisor(factor: Any) -> float:
    if not isinstance(factor, (int, float)) or not 0 < factor < math.inf:
        raise ValueError(f"fastvit.images: rescale_factor must be a positive number, got {factor!r}")
    return 1 / factor


def _positive(std: tuple[float, float, float]) -> tuple[float, float, float]:
    if min(std) <= 0:
        raise ValueError(f"fastvit.images: std must be positive, got {std!r}")
    return std


def _three(value: Any) -> tuple[float, float, float]:
    numbers = tuple(value) if isinstance(value, (tuple, list)) else (value,) * 3
    if len(numbers) != 3 or not all(isinstance(n, (int, float)) and math.isfinite(n) for n in numbers):
        raise ValueError(f"fastvit.images: mean and std must be a number or one for each of 3 channels, got {value!r}")
    return numbers[0], numbers[1], numbers[2]
