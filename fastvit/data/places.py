"""Where labelled images lie: a place's name becomes a source."""

from collections.abc import Callable
from pathlib import Path

from .cifar import cifar, recognised
from .digits import digits
from .source import DataError, Source

SPLITS = ("train", "test")
KINDS = ("cifar10", "cifar100", "folder", "wds", "hf")
FORMS = (
    "digits, cifar10:DIR, cifar100:DIR, folder:DIR, wds:DIR/train-{000..009}.tar, hf:NAME_OR_DIR, a directory, "
    "a pattern of .tar files"
)


def open_source(place: str, split: str = "train") -> Source:
    """The labelled images of a place.

    Args:
        place: "digits" (scikit-learn's), "cifar10:DIR", "cifar100:DIR", "folder:DIR" (DIR/train/<class>/*.jpg, or
            DIR/<class>/*.jpg, of which a fixed fifth is the test set), "wds:DIR/train-{000..009}.tar" (WebDataset),
            "hf:NAME_OR_DIR" (Hugging Face datasets); or a directory or a pattern of tar files, recognised by what is
            there.
        split: "train" or "test".

    Raises:
        DataError: no such place, or what lies there cannot be used.
        ImportError: the place needs a package that is not installed.
    """
    if split not in SPLITS:
        raise DataError(f"split must be one of {', '.join(SPLITS)}, got {split!r}")
    if place == "digits":
        return digits(split)
    kind, colon, where = place.partition(":")
    if not colon or kind not in KINDS:
        kind, where = _kind(place), place
    if not where:
        raise DataError(f"{place}: nothing behind the colon (expected {FORMS})")
    return _OPENED[kind](where, split)


def _folder(where: str, split: str) -> Source:
    from .folder import folder

    return folder(where, split)


def _shards(where: str, split: str) -> Source:
    from .shards import shards

    return shards(where, split)


def _hugging_face(where: str, split: str) -> Source:
    from .hugging_face import hugging_face

    return hugging_face(where, split)


# pillow is imported where images have to be decoded
_OPENED: dict[str, Callable[[str, str], Source]] = {
    "cifar10": lambda where, split: cifar(where, split, "cifar10"),
    "cifar100": lambda where, split: cifar(where, split, "cifar100"),
    "folder": _folder,
    "wds": _shards,
    "hf": _hugging_face,
}


def _kind(place: str) -> str:
    """What lies in a directory, or behind a pattern of tar files."""
    directory = Path(place)
    if place.endswith(".tar"):
        return "wds"
    if not directory.is_dir():
        raise DataError(f"{place}: no such directory, and no other place of images (expected {FORMS})")
    for kind in ("cifar10", "cifar100"):
        if recognised(directory, kind, least=2):  # one alone may be called `test` by chance
            return kind
    from .hugging_face import saved_to_disk

    if saved_to_disk(directory):
        return "hf"
    if any(directory.glob("*.tar")):
        return "wds"
    if any(directory.glob("*.parquet")) or any(directory.glob("data/*.parquet")):
        return "hf"
    if any(entry.is_dir() and entry.name[0] != "." for entry in directory.iterdir()):
        return "folder"
    raise DataError(
        f"{place}: no images recognised (looked for files of CIFAR-10 and CIFAR-100, a data set of save_to_disk, "
        "*.tar, *.parquet, and folders of images, one for each class)"
    )
