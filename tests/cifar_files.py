"""Small sets in exactly the files of CIFAR-10 and CIFAR-100: byte for byte as Python 2 pickled them, and binary."""

import pickle
import struct
from pathlib import Path
from typing import ClassVar

import numpy as np

CIFAR10 = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
BATCHES = tuple(f"data_batch_{number}" for number in range(1, 6))


class Python2Pickler(pickle._Pickler):
    """Protocol 2 as Python 2 and its numpy wrote it: strings of bytes, numpy's modules under their old names."""

    dispatch: ClassVar = dict(pickle._Pickler.dispatch)

    def save_string(self, text):
        data = text.encode("latin1") if isinstance(text, str) else text
        short = len(data) < 256
        self.write(b"U" + bytes([len(data)]) + data if short else b"T" + struct.pack("<i", len(data)) + data)
        self.memoize(text)

    def save_named(self, obj, name=None):
        module = obj.__module__.replace("numpy._core", "numpy.core")
        self.write(f"c{module}\n{name or obj.__qualname__}\n".encode())
        self.memoize(obj)

    dispatch[str] = dispatch[bytes] = save_string
    dispatch[type] = save_named
    save_global = save_named


def dump(value, path: Path) -> None:
    with path.open("wb") as file:
        Python2Pickler(file, protocol=2).dump(value)


def random_set(count: int, classes: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Pixels, uint8 (N, 3072), and classes (N,), each of which occurs if there is room."""
    rng = np.random.default_rng(seed)
    labels = rng.permutation(np.arange(count) % classes)
    return rng.integers(0, 256, (count, 3072), dtype=np.uint8), labels


def write_cifar10(root: Path, train: tuple, test: tuple, binary: bool = False) -> Path:
    """The files of CIFAR-10 in a folder of its name inside `root`; `train` and `test` are pixels and labels."""
    folder = root / ("cifar-10-batches-bin" if binary else "cifar-10-batches-py")
    folder.mkdir(parents=True)
    pixels, labels = (np.array_split(array, 5) for array in train)
    for name, data, of_data in zip((*BATCHES, "test_batch"), (*pixels, test[0]), (*labels, test[1]), strict=True):
        if binary:
            records = np.concatenate([of_data[:, None].astype(np.uint8), data], axis=1)
            (folder / f"{name}.bin").write_bytes(records.tobytes())
            continue
        batch = {
            "batch_label": f"training batch {name[-1]} of 5",
            "labels": [int(label) for label in of_data],
            "data": np.ascontiguousarray(data),
            "filenames": [f"image_s_{number:06d}.png" for number in range(len(data))],
        }
        dump(batch, folder / name)
    if binary:
        (folder / "batches.meta.txt").write_text("\n".join(CIFAR10) + "\n\n")
    else:
        dump({"num_cases_per_batch": 10000, "label_names": list(CIFAR10), "num_vis": 3072}, folder / "batches.meta")
    return folder


def write_cifar100(root: Path, train: tuple, test: tuple, binary: bool = False) -> Path:
    """The same for CIFAR-100; a coarse label is a fifth of the fine one."""
    folder = root / ("cifar-100-binary" if binary else "cifar-100-python")
    folder.mkdir(parents=True)
    fine, coarse = [f"fine_{n}" for n in range(100)], [f"coarse_{n}" for n in range(20)]
    for name, (data, labels) in (("train", train), ("test", test)):
        if binary:
            leading = np.stack([labels // 5, labels], axis=1).astype(np.uint8)
            (folder / f"{name}.bin").write_bytes(np.concatenate([leading, data], axis=1).tobytes())
            continue
        batch = {
            "filenames": [f"image_s_{number:06d}.png" for number in range(len(data))],
            "batch_label": f"{name}ing batch 1 of 1",
            "fine_labels": [int(label) for label in labels],
            "coarse_labels": [int(label) // 5 for label in labels],
            "data": np.ascontiguousarray(data),
        }
        dump(batch, folder / name)
    if binary:
        (folder / "fine_label_names.txt").write_text("\n".join(fine) + "\n")
        (folder / "coarse_label_names.txt").write_text("\n".join(coarse) + "\n")
    else:
        dump({"fine_label_names": fine, "coarse_label_names": coarse}, folder / "meta")
    return folder
