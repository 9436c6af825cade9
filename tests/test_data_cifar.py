"""CIFAR's files, written as its authors do, read and refused."""

import os
import pickle
import pickletools

import cifar_files
import numpy as np
import pytest
import torch

from fastvit.data import DataError, open_source

WRITERS = {"cifar10": cifar_files.write_cifar10, "cifar100": cifar_files.write_cifar100}
CLASSES = {"cifar10": 10, "cifar100": 100}


@pytest.fixture(params=[(kind, binary) for kind in WRITERS for binary in (False, True)], ids=str)
def written(request, tmp_path):
    """A kind, its folder and what was written: 23 training images, in five files of 4 or 5, and 7 others."""
    kind, binary = request.param
    train, test = cifar_files.random_set(23, CLASSES[kind]), cifar_files.random_set(7, CLASSES[kind], seed=1)
    return kind, WRITERS[kind](tmp_path, train, test, binary), train, test


def test_it_is_read_from_its_folder_and_the_one_above(written):
    kind, folder, train, test = written
    for split, (pixels, labels) in (("train", train), ("test", test)):
        for place in (f"{kind}:{folder}", f"{kind}:{folder.parent}", str(folder), str(folder.parent)):
            source = open_source(place, split)
            assert (source.name, len(source), len(source.classes)) == (kind, len(labels), CLASSES[kind])
            for number in range(len(labels)):
                image, label = source[number]
                assert image.dtype == torch.uint8 and label == labels[number]
                np.testing.assert_array_equal(image.numpy(), pixels[number].reshape(3, 32, 32))
    named = "deer" if kind == "cifar10" else "fine_4"
    assert source.classes[4] == named


@pytest.mark.parity
@pytest.mark.parametrize("kind", WRITERS)
def test_torchvision_reads_the_same(kind, tmp_path, monkeypatch):
    torchvision = pytest.importorskip("torchvision")
    monkeypatch.setattr(torchvision.datasets.cifar, "check_integrity", lambda *_: True)
    train, test = cifar_files.random_set(23, CLASSES[kind]), cifar_files.random_set(7, CLASSES[kind], seed=1)
    WRITERS[kind](tmp_path, train, test)
    reader = {"cifar10": torchvision.datasets.CIFAR10, "cifar100": torchvision.datasets.CIFAR100}[kind]
    for split in ("train", "test"):
        theirs, ours = reader(tmp_path, train=split == "train"), open_source(str(tmp_path), split)
        assert theirs.classes == ours.classes and theirs.targets == ours.labels.tolist()
        np.testing.assert_array_equal(theirs.data, ours.images.permute(0, 2, 3, 1).numpy())


def test_the_writer_writes_what_python_2_did(tmp_path):
    folder = cifar_files.write_cifar10(tmp_path, cifar_files.random_set(10, 10), cifar_files.random_set(5, 10))
    opcodes = list(pickletools.genops((folder / "test_batch").read_bytes()))
    assert {op.name for op, _, _ in opcodes} >= {"SHORT_BINSTRING", "BINSTRING", "GLOBAL", "REDUCE", "BUILD"}
    assert not any("UNICODE" in op.name for op, _, _ in opcodes)
    named = [argument for op, argument, _ in opcodes if op.name == "GLOBAL"]
    assert named == ["numpy.core.multiarray _reconstruct", "numpy ndarray", "numpy dtype"]


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_todays_pickles_are_read_as_well(tmp_path, protocol):
    pixels, labels = cifar_files.random_set(10, 10)
    folder = cifar_files.write_cifar10(tmp_path, (pixels, labels), (pixels, labels))
    for data in (pixels, np.asfortranarray(pixels)):
        batch = {b"data": data, b"labels": labels.tolist()}
        (folder / "test_batch").write_bytes(pickle.dumps(batch, protocol=protocol))
        np.testing.assert_array_equal(open_source(str(folder), "test").images.view(10, -1).numpy(), pixels)


def test_truncated_files(written):
    kind, folder, *_ = written
    path = folder / next(n for n in ("test_batch", "test_batch.bin", "test", "test.bin") if (folder / n).exists())
    whole = path.read_bytes()
    for length in (1, 40, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(DataError, match="truncated") as raised:
            open_source(f"{kind}:{folder}", "test")
        assert str(raised.value).startswith(str(path)) and "\n" not in str(raised.value)
    path.write_bytes(b"")
    with pytest.raises(DataError, match="the file is empty"):
        open_source(f"{kind}:{folder}", "test")
    path.unlink()
    with pytest.raises(DataError, match=f"{path.name} missing"):
        open_source(f"{kind}:{folder}", "test")
    open_source(f"{kind}:{folder}", "train")


def test_labels_out_of_range(tmp_path):
    for kind, beyond in (("cifar10", 10), ("cifar100", 100)):
        for binary in (False, True):
            pixels, labels = cifar_files.random_set(20, 10)
            labels[13] = beyond
            root = tmp_path / f"{kind}{binary}"
            WRITERS[kind](root, (pixels, labels), (pixels, labels), binary)
            with pytest.raises(DataError, match=f"image 13 has label {beyond}, expected 0 to {beyond - 1}"):
                open_source(f"{kind}:{root}", "test")


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"data": np.zeros((5, 3071), np.uint8)}, r"'data' is \(5, 3071\), expected uint8 \(N, 3072\)"),
        ({"data": np.zeros((0, 3072), np.uint8)}, r"\(0, 3072\), expected .* N > 0"),
        ({"data": [1, 2]}, "'data' is list"),
        ({"data": np.zeros((5, 3072), np.float32)}, "dtype b'f4', expected uint8"),
        ({"data": np.array([None])}, "expected uint8"),
        ({"labels": [0, 1]}, "2 'labels' for 5 images"),
        ({"labels": None}, "no list of 'labels'"),
        ({"labels": [0, 1, 2, 3, "4"]}, "expected numbers of classes"),
        ({"labels": [0, 1, 2, 3, -1]}, "image 4 has label -1"),
    ],
)
def test_pickles_of_the_wrong_content(tmp_path, changed, message):
    pixels, labels = cifar_files.random_set(5, 10)
    folder = cifar_files.write_cifar10(tmp_path, (pixels, labels), (pixels, labels))
    cifar_files.dump({"data": pixels, "labels": labels.tolist(), **changed}, folder / "test_batch")
    with pytest.raises(DataError, match=message):
        open_source(str(folder), "test")


class Runs:
    def __init__(self, function, *arguments):
        self.reduced = function, arguments

    def __reduce__(self):
        return self.reduced


@pytest.mark.parametrize(
    "function", [os.mkdir, eval, np.ndarray, np.load, bytearray, pickle.loads], ids=lambda f: f.__name__
)
def test_a_pickle_runs_nothing(tmp_path, function):
    pixels, labels = cifar_files.random_set(5, 10)
    folder = cifar_files.write_cifar10(tmp_path, (pixels, labels), (pixels, labels))
    target = tmp_path / "made"
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        evil = pickle.dumps({b"data": pixels, b"labels": [Runs(function, str(target))]}, protocol=protocol)
        (folder / "test_batch").write_bytes(evil)
        with pytest.raises(DataError, match="not as CIFAR is pickled") as raised:
            open_source(str(folder), "test")
        assert function.__name__ in str(raised.value) and not target.exists()


@pytest.mark.parametrize(
    "data",
    [
        b"\x80\x02N.",
        b"not a pickle at all",
        b"\x80\x05\x96\xff\xff\xff\xff\xff\xff\xff\x7f.",  # a byte array as large as memory
        b"\x80\x02\x82\x01.",
        b"\x80\x02cos\nsystem\n(S'true'\ntR.",
        b"(S'true'\nios\nsystem\n.",
    ],
)
def test_bytes_that_are_no_pickle_of_cifar(tmp_path, data):
    pixels, labels = cifar_files.random_set(5, 10)
    folder = cifar_files.write_cifar10(tmp_path, (pixels, labels), (pixels, labels))
    (folder / "test_batch").write_bytes(data)
    with pytest.raises(DataError, match=r"not as CIFAR is pickled|expected a dictionary|truncated"):
        open_source(str(folder), "test")


def test_a_version_without_its_names(written):
    kind, folder, *_ = written
    meta = next(folder.glob("*meta*"), folder / "fine_label_names.txt")
    meta.write_bytes(b"")
    with pytest.raises(DataError, match=f"{meta.name}: the (file is empty|pickle ends early)"):
        open_source(f"{kind}:{folder}")
    meta.unlink()
    with pytest.raises(DataError, match=f"{meta.name} missing"):
        open_source(f"{kind}:{folder}")


def test_where_there_is_no_cifar(tmp_path):
    with pytest.raises(DataError, match=r"no cifar10 here \(looked in it and .*cifar-10-batches-py"):
        open_source(f"cifar10:{tmp_path}")
