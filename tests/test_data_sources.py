"""Folders, shards, Hugging Face data sets and the digits: read as other libraries do, and refused in one line."""

import io
import json
import pickle
import sys
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image

from fastvit.data import DataError, open_source
from fastvit.data.split import stratified


def picture(seed: int, size: tuple[int, int] = (9, 7)) -> Image.Image:
    """An image of (height, width) whose pixels follow from a seed."""
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8))


def png(seed: int) -> bytes:
    file = io.BytesIO()
    picture(seed).save(file, "png")
    return file.getvalue()


def assert_is_picture(image: torch.Tensor, seed: int) -> None:
    assert image.dtype == torch.uint8
    np.testing.assert_array_equal(image.permute(1, 2, 0).numpy(), np.asarray(picture(seed)))


def write_folder(root, counts: dict[str, int], first: int = 0):
    """Images 0.png, 1.png ... of consecutive seeds in a folder for each class."""
    for name, count in counts.items():
        (root / name).mkdir(parents=True)
        for number in range(count):
            picture(first + number).save(root / name / f"{number}.png")
        first += count
    return root


def write_shard(path, samples: dict[str, bytes]):
    with tarfile.open(path, "w") as tar:
        for name, data in samples.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path


def write_shards(root, split: str, counts: tuple[int, ...], classes: int = 3) -> None:
    first = 0
    for number, count in enumerate(counts):
        samples = {}
        for seed in range(first, first + count):
            samples.update({f"{seed:04d}.png": png(seed), f"{seed:04d}.cls": str(seed % classes).encode()})
        write_shard(root / f"{split}-{number:03d}.tar", samples)
        first += count


def test_folders_for_training_and_validation(tmp_path):
    write_folder(tmp_path / "train", {"cat": 3, "ant": 2})
    write_folder(tmp_path / "val", {"cat": 2}, first=10)
    for place in (f"folder:{tmp_path}", str(tmp_path)):
        train, test = open_source(place), open_source(place, "test")
        assert train.name == tmp_path.name and train.classes == test.classes == ["ant", "cat"]
        assert [train[n][1] for n in range(len(train))] == [0, 0, 1, 1, 1]
        assert [test[n][1] for n in range(len(test))] == [1, 1]
        for number, seed in enumerate((3, 4, 0, 1, 2)):
            assert_is_picture(train[number][0], seed)
    write_folder(tmp_path / "test", {"ant": 1, "cat": 4})
    assert len(open_source(str(tmp_path), "test")) == 5


@pytest.mark.parity
def test_torchvision_reads_the_same_folder(tmp_path):
    torchvision = pytest.importorskip("torchvision")
    write_folder(tmp_path / "train", {"b": 3, "a": 2, "C": 1})
    write_folder(tmp_path / "train/b/deeper", {"still": 2}, first=20)
    theirs, ours = torchvision.datasets.ImageFolder(tmp_path / "train"), open_source(str(tmp_path))
    assert theirs.classes == ours.classes and theirs.targets == ours.labels
    for number, (image, label) in enumerate(theirs):
        np.testing.assert_array_equal(ours[number][0].permute(1, 2, 0).numpy(), np.asarray(image))
        assert ours[number][1] == label


def test_folders_without_a_split_are_divided(tmp_path):
    write_folder(tmp_path, {"a": 10, "b": 20, "single": 1})
    train, test = open_source(str(tmp_path)), open_source(str(tmp_path), "test")
    assert torch.tensor(train.labels).bincount().tolist() == [8, 16, 1]
    assert torch.tensor(test.labels).bincount().tolist() == [2, 4]
    assert sorted([*train.files, *test.files]) == sorted(str(path) for path in tmp_path.rglob("*.png"))
    moved = tmp_path.rename(tmp_path.with_name("elsewhere"))
    assert [f.rpartition("elsewhere/")[2] for f in open_source(str(moved), "test").files] == [
        file.partition(f"{tmp_path.name}/")[2] for file in test.files
    ]


def test_the_split_is_fixed_and_stratified():
    labels, names = [n % 3 for n in range(60)], [str(n) for n in range(60)]
    train, test = stratified(labels, names, "train"), stratified(labels, names, "test")
    assert sorted(train + test) == list(range(60)) and train == sorted(train)
    assert [sum(labels[n] == k for n in test) for k in range(3)] == [4, 4, 4]
    assert test == [8, 9, 13, 39, 46, 47, 49, 50, 51, 53, 54, 55]  # whoever changes it changes everybody's test set


def test_folders_refused(tmp_path):
    with pytest.raises(DataError, match="nowhere: no such directory"):
        open_source(f"folder:{tmp_path}/nowhere")
    with pytest.raises(DataError, match="no folders of images"):
        open_source(f"folder:{tmp_path}")
    write_folder(tmp_path / "train", {"a": 1, "b": 1})
    with pytest.raises(DataError, match=r"no test set \(looked for test/<class>, val/<class>.*; found train\)"):
        open_source(str(tmp_path), "test")
    write_folder(tmp_path / "val", {"c": 1})
    with pytest.raises(DataError, match=r"val/c: a class that .*train lacks"):
        open_source(str(tmp_path), "test")
    (tmp_path / "train/a/0.png").write_bytes(png(0)[:60])
    with pytest.raises(DataError, match=r"train/a/0.png: .*truncated"):
        open_source(str(tmp_path))[0]
    (tmp_path / "train/b/0.png").unlink()
    with pytest.raises(DataError, match="train/b: a class without images"):
        open_source(str(tmp_path))


def test_shards_by_range_glob_and_directory(tmp_path):
    write_shards(tmp_path, "train", (4, 1, 3))
    write_shards(tmp_path, "val", (2,))
    for place in ("wds:{}/train-{{000..002}}.tar", "{}/train-{{000,001,002}}.tar", "{}/train-*.tar", "{}", "wds:{}"):
        source = open_source(place.format(tmp_path))
        assert source.classes == ["0", "1", "2"] and len(source) == 8
        assert len(open_source(place.format(tmp_path), "test")) == 2
        for seed in range(8):
            assert source[seed][1] == seed % 3
            assert_is_picture(source[seed][0], seed)
    (tmp_path / "classes.txt").write_text("ant\nbee\ncat\ndog\n")
    assert open_source(str(tmp_path)).classes == ["ant", "bee", "cat", "dog"]


def test_shards_in_folders_of_their_split_and_without_a_split(tmp_path):
    for split, counts in (("train", (5, 5)), ("validation", (3,))):
        (tmp_path / split).mkdir()
        write_shards(tmp_path / split, "part", counts)
    place = f"wds:{tmp_path}/train/part-{{000..001}}.tar"
    assert (len(open_source(place)), len(open_source(place, "test"))) == (10, 3)
    (tmp_path / "whole").mkdir()
    write_shards(tmp_path / "whole", "part", (9, 6))
    train, test = (open_source(f"wds:{tmp_path}/whole", split) for split in ("train", "test"))
    assert (len(train), len(test)) == (12, 3) and sorted(test.labels) == [0, 1, 2]
    assert not {sample.member for sample in train.samples} & {sample.member for sample in test.samples}


def test_what_members_make_a_sample(tmp_path):
    members = {
        "a/0.JPEG": b"",
        "a/0.json": json.dumps({"label": 2, "caption": "x"}).encode(),
        "b/0.seg.png": b"",  # another extension of the same name
        "b/0.webp": b"",
        "b/0.cls": b"1\n",
        "b/0.json": b"{}",
        "info.json": b"[1, 2]",
    }
    source = open_source(str(write_shard(tmp_path / "x-0.tar", {**members, "c.png": png(5), "c.cls": b"0"})))
    assert source.labels == [2, 1, 0]
    assert_is_picture(source[2][0], 5)
    with pytest.raises(DataError, match=r"x-0.tar: a/0.JPEG: the file is empty"):
        source[0]


@pytest.mark.parametrize(
    ("samples", "message"),
    [
        ({"0.png": b"", "1.png": b"", "1.cls": b"0"}, r"0.png has no label \(looked for 0.cls and 0.json"),
        ({"0.png": b"", "0.json": b"{}"}, "0.png has no label"),
        ({"0.cls": b"1"}, "0.cls has no image"),
        ({"0.png": b"", "0.cls": b"cat"}, "0.cls: b'cat' is no number"),
        ({"0.png": b"", "0.cls": b"-1"}, "0.cls: label -1, expected 0 or more"),
        ({"0.png": b"", "0.json": b'{"label": "cat"}'}, "the label is 'cat', expected the number of a class"),
        ({"0.png": b"", "0.json": b"{"}, "is no JSON"),
        ({"0.png": b"", "0.cls": b"1", "0.jpg": b""}, "0 has two members of its kind, .jpg the second"),
        ({"readme.txt": b"x"}, "no samples in 1 shards"),
    ],
)
def test_samples_refused(tmp_path, samples, message):
    path = write_shard(tmp_path / "x-0.tar", samples)
    with pytest.raises(DataError, match=message) as raised:
        open_source(f"wds:{path}")
    assert str(raised.value).startswith(str(path))


def test_shards_refused(tmp_path):
    write_shards(tmp_path, "train", (2, 2))
    with pytest.raises(DataError, match=r"train-002.tar: missing shard \(of .*train-\{000..003\}.tar"):
        open_source(f"wds:{tmp_path}/train-{{000..003}}.tar")
    with pytest.raises(DataError, match=r"other-\*.tar: no shard matches"):
        open_source(f"wds:{tmp_path}/other-*.tar")
    with pytest.raises(DataError, match=r"no shards of the test set \(looked for .*test-\*.tar, .*val-\*.tar"):
        open_source(f"wds:{tmp_path}/train-{{000..001}}.tar", "test")
    with pytest.raises(DataError, match="is neither a range"):
        open_source(f"wds:{tmp_path}/train-{{000-001}}.tar")
    whole = (tmp_path / "train-001.tar").read_bytes()
    lengths = range(512, len(whole) - 10240, 512)  # every block of every member, and the headers between them
    assert len(lengths) < 40
    for length in (1, 100, *lengths, *(n + 100 for n in lengths)):
        (tmp_path / "train-001.tar").write_bytes(whole[:length])
        with pytest.raises(DataError, match=r"train-001.tar: .*truncated"):
            open_source(str(tmp_path))
    damaged = bytearray(whole)
    damaged[1024 * 2 : 1024 * 2 + 512] = b"x" * 512
    (tmp_path / "train-001.tar").write_bytes(bytes(damaged))
    with pytest.raises(DataError, match=r"train-001.tar: truncated or damaged"):
        open_source(str(tmp_path))
    (tmp_path / "train-001.tar").write_bytes(b"")
    with pytest.raises(DataError, match="not an uncompressed tar file"):
        open_source(str(tmp_path))


@pytest.fixture
def datasets(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    return datasets


def rows(datasets, count: int, label="label", image="image", named=True, first=0):
    kind = datasets.ClassLabel(names=["ant", "bee", "cat"]) if named else datasets.Value("int64")
    features = datasets.Features({image: datasets.Image(), label: kind})
    columns = {image: [picture(first + n) for n in range(count)], label: [n % 3 for n in range(count)]}
    return datasets.Dataset.from_dict(columns, features=features)


@pytest.mark.parametrize("named", [True, False])
def test_hugging_face_saved_to_disk(datasets, tmp_path, named):
    parts = {
        "train": rows(datasets, 7, "fine_label", "img", named),
        "test": rows(datasets, 4, "fine_label", "img", named),
    }
    datasets.DatasetDict(parts).save_to_disk(tmp_path / "saved")
    for place in (f"hf:{tmp_path}/saved", f"{tmp_path}/saved"):
        train, test = open_source(place), open_source(place, "test")
        assert train.classes == (["ant", "bee", "cat"] if named else ["0", "1", "2"])
        assert (train.name, len(train), len(test)) == ("saved", 7, 4)
    again = pickle.loads(pickle.dumps(train))  # as a worker that is not forked gets it
    for number in range(7):
        assert_is_picture(again[number][0], number)
        assert again[number][1] == number % 3


def test_hugging_face_with_one_part_is_divided(datasets, tmp_path):
    rows(datasets, 30, "labels").save_to_disk(tmp_path / "saved")
    train, test = (open_source(f"{tmp_path}/saved", split) for split in ("train", "test"))
    assert torch.tensor(train.labels).bincount().tolist() == [8, 8, 8]
    assert torch.tensor(test.labels).bincount().tolist() == [2, 2, 2]
    seen = [test[n][0].sum().item() for n in range(6)] + [train[n][0].sum().item() for n in range(24)]
    assert sorted(seen) == sorted(int(np.asarray(picture(n)).sum()) for n in range(30))


def test_hugging_face_from_parquet_and_image_folders(datasets, tmp_path):
    (tmp_path / "tables").mkdir()
    rows(datasets, 5).to_parquet(tmp_path / "tables/train-00000-of-00001.parquet")
    rows(datasets, 3, first=50).to_parquet(tmp_path / "tables/validation-00000-of-00001.parquet")
    source = open_source(f"{tmp_path}/tables", "test")
    assert source.classes == ["ant", "bee", "cat"] and source.labels == [0, 1, 2]
    assert_is_picture(source[1][0], 51)
    write_folder(tmp_path / "folder/train", {"a": 2, "b": 1})
    write_folder(tmp_path / "folder/test", {"a": 1, "b": 1}, first=20)
    source = open_source(f"hf:{tmp_path}/folder", "test")
    assert source.classes == ["a", "b"] and source.labels == [0, 1]
    assert_is_picture(source[1][0], 21)


def test_hugging_face_refused(datasets, tmp_path, monkeypatch):
    rows(datasets, 6, "target").save_to_disk(tmp_path / "no_label")
    with pytest.raises(DataError, match=r"no column label or labels or fine_label \(found image, target\)"):
        open_source(f"hf:{tmp_path}/no_label")
    rows(datasets, 6, image="pixels").save_to_disk(tmp_path / "no_image")
    with pytest.raises(DataError, match="no column image or img"):
        open_source(f"hf:{tmp_path}/no_image")
    datasets.Dataset.from_dict({"image": [[1]], "label": [0]}).save_to_disk(tmp_path / "lists")
    with pytest.raises(DataError, match=r"column 'image' is List.*, expected Image"):
        open_source(f"hf:{tmp_path}/lists")
    unlabelled = rows(datasets, 2).map(lambda row: {"label": -1})
    datasets.DatasetDict({"train": rows(datasets, 3), "test": unlabelled}).save_to_disk(tmp_path / "unlabelled")
    with pytest.raises(DataError, match="image 0 has label -1, expected 0 to 2"):
        open_source(f"hf:{tmp_path}/unlabelled", "test")
    datasets.DatasetDict({"train": rows(datasets, 3), "extra": unlabelled}).save_to_disk(tmp_path / "no_test")
    with pytest.raises(DataError, match=r"no test set \(looked for test, val, validation, valid; found train, extra"):
        open_source(f"hf:{tmp_path}/no_test", "test")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=f"hf:{tmp_path}/empty: "):
        open_source(f"hf:{tmp_path}/empty")
    assert not datasets.are_progress_bars_disabled()
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ImportError, match=r"^fastvit.data: .* install it with: pip install datasets"):
        open_source(f"hf:{tmp_path}/no_test")


def test_digits():
    sklearn = pytest.importorskip("sklearn.datasets")
    train, test = open_source("digits"), open_source("digits", "test")
    assert (len(train), len(test), train.classes) == (1438, 359, [str(n) for n in range(10)])
    counts = torch.from_numpy(sklearn.load_digits().target).bincount()
    assert torch.equal(train.labels.bincount() + test.labels.bincount(), counts)
    assert (test.labels.bincount() / counts - 0.2).abs().max() < 0.005
    assert train.images.shape == (1438, 3, 32, 32) and (train.images == train.images[:, :1]).all()
    mine = stratified(sklearn.load_digits().target.tolist(), [str(n) for n in range(1797)], "test")
    for number in (0, 17, 358):
        small = np.rint(sklearn.load_digits().images[mine[number]] * 255 / 16).astype(np.uint8)
        large = np.asarray(Image.fromarray(small).resize((32, 32), Image.Resampling.BILINEAR)).astype(int)
        assert np.abs(test.images[number, 0].numpy().astype(int) - large).max() <= 2  # pillow rounds twice
        assert test.labels[number] == sklearn.load_digits().target[mine[number]]


def test_digits_without_scikit_learn(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(ImportError, match=r"^fastvit.data: digits need scikit-learn .* pip install scikit-learn"):
        open_source("digits")


def test_places_refused(tmp_path):
    for place, message in (
        ("no/such/place", r"no/such/place: no such directory.*expected digits, cifar10:DIR"),
        ("imagenet:somewhere", "expected digits, cifar10:DIR"),
        ("cifar10:", "nothing behind the colon"),
        (str(tmp_path), r"no images recognised \(looked for files of CIFAR-10 .*tar.*parquet.*folders of images"),
    ):
        with pytest.raises(DataError, match=message):
            open_source(place)
    with pytest.raises(DataError, match="split must be one of train, test, got 'val'"):
        open_source("digits", "val")
