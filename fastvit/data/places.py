"""Where labelled images lie: a place's name becomes a source."""

from pathlib import Path

from .cifar import cifar, recognised
from .digits import digits
from .source import DataError, Source

SPLITS = ("train", "test")
FORMS = "digits, cifar10:DIR, cifar100:DIR, folder:DIR, wds:DIR/train-{000..009}.tar, hf:NAME_OR_DIR, or a directory"


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
    if colon and kind in ("cifar10", "cifar100"):
        return cifar(where, split, kind)
    for kind in ("cifar10", "cifar100"):
        if recognised(Path(place), kind):
            return cifar(place, split, kind)
    raise DataError(f"{place}: not a place of images (expected {FORMS})")
