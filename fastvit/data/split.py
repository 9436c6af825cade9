"""Which images are for training and which for the test, where the data say so and where they do not."""

import hashlib
from collections import defaultdict
from collections.abc import Sequence

SHARE = 0.2
NAMES = {"train": ("train",), "test": ("test", "val", "validation", "valid")}  # in the order in which they are tried


def stratified(labels: Sequence[int], names: Sequence[str], split: str) -> list[int]:
    """The numbers of the images that belong to a split, in order: a fifth of every class is the test set.

    The images of a class whose names have the smallest digests are its test set, so that the split is the same on
    every machine and in every version of every library. A class of one image has no test image.

    Args:
        labels: the class of each image.
        names: what each is called, the same wherever the data lie.
        split: "train" or "test".
    """
    members = defaultdict(list)
    for number, (label, name) in enumerate(zip(labels, names, strict=True)):
        members[label].append((hashlib.sha256(name.encode("utf-8", "surrogateescape")).digest(), number))
    held_out: set[int] = set()
    for of_class in members.values():
        count = max(1, round(SHARE * len(of_class))) if len(of_class) > 1 else 0
        held_out.update(number for _, number in sorted(of_class)[:count])
    return [number for number in range(len(labels)) if (number in held_out) == (split == "test")]
