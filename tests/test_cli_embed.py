"""`fastvit embed`: timm's and transformers' features, whole parts or none, the same rows after being killed."""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from checkpoint_models import hf, save_hf
from models import randomize, timm
from PIL import Image
from safetensors.torch import save_file
from test_cli import run  # noqa: F401  (a fixture)
from test_images import photo

pyarrow = pytest.importorskip("pyarrow")
pytest.importorskip("pyarrow.parquet")

ROOT = Path(__file__).resolve().parent.parent
NAME, SIDE, CLASSES = "vit_tiny_patch16_224", 32, 7
SEEN = {"crop_pct": 1.0, "mean": (0.5,) * 3, "std": (0.5,) * 3, "interpolation": "bicubic"}


@pytest.fixture(scope="module")
def model() -> torch.nn.Module:
    return randomize(timm.create_model(NAME, num_classes=CLASSES, img_size=SIDE)).eval()


@pytest.fixture(scope="module")
def here(model: torch.nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint, and eleven photographs in folders below each other."""
    folder = tmp_path_factory.mktemp("embed")
    save_file(model.state_dict(), folder / "vit.safetensors")
    (folder / "photos" / "a" / "b").mkdir(parents=True)
    for number in range(11):
        place = folder / "photos" / ("", "a", "a/b")[number % 3] / f"{number:02d}.png"
        values = np.random.default_rng(number).integers(0, 256, (40 + number, 50, 3), dtype=np.uint8)
        Image.fromarray(values).save(place)
    return folder


def options(here: Path, *more: object) -> tuple[object, ...]:
    fixed = ("--checkpoint", here / "vit.safetensors", "--img-size", SIDE, "--crop-pct", "1", "--device", "cpu")
    return (*fixed, *more)


@pytest.fixture
def embed(run, here: Path):  # noqa: F811
    def call(*arguments: object) -> tuple[int, str, str]:
        return run("embed", here / "photos", *options(here), *arguments)

    return call


def rows(folder: Path) -> dict[str, np.ndarray]:
    """Name of the image -> its features, as another program reads them."""
    table = pyarrow.parquet.read_table(folder)
    assert table.column_names == ["path", "feature"]
    kind = table.schema.field("feature").type
    assert pyarrow.types.is_fixed_size_list(kind)
    values = np.stack(table["feature"].to_numpy()) if len(table) else np.empty((0, kind.list_size))
    assert values.shape == (len(table), kind.list_size)
    return dict(zip(table["path"].to_pylist(), values, strict=True))


def pixels(paths: list[Path], **other) -> torch.Tensor:
    transform = timm.data.create_transform((3, SIDE, SIDE), is_training=False, **{**SEEN, **other})
    return torch.stack([transform(Image.open(path).convert("RGB")) for path in paths])


def same(found: dict[str, np.ndarray], paths: list[Path], expected: torch.Tensor, tolerance: float = 1e-4) -> None:
    assert list(found) == [str(path) for path in paths]
    got = torch.from_numpy(np.stack(list(found.values()))).float()
    torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance)


def photographs(here: Path) -> list[Path]:
    return sorted((here / "photos").rglob("*.png"))


@pytest.mark.parity
@torch.no_grad()
def test_timms_features_in_parts_of_one_table(embed, model: torch.nn.Module, here: Path, tmp_path: Path) -> None:
    paths, folder = photographs(here), tmp_path / "new" / "f.parquet"
    code, out, err = embed("-o", folder, "--shard", 4, "--batch-size", 3, "--json")
    assert (code, err) == (0, "")
    told = json.loads(out)
    assert told == {"model": NAME, "written": str(folder), "images": 11, "failed": 0, "width": 192, "parts": 3}
    assert sorted(p.name for p in folder.iterdir()) == ["_manifest.json", *(f"part-0000{i}.parquet" for i in range(3))]
    tokens = model.forward_features(pixels(paths))
    same(rows(folder), paths, model.forward_head(tokens, pre_logits=True))
    pandas = pytest.importorskip("pandas")
    assert pandas.read_parquet(folder)["path"].tolist() == [str(path) for path in paths]
    assert pyarrow.parquet.read_table(folder / "part-00002.parquet").num_rows == 3
    for arguments, expected, tolerance in (
        (("--pool", "token"), tokens[:, 0], 1e-4),
        (("--pool", "avg", "--feature-dtype", "float16"), tokens[:, 1:].mean(1), 2e-3),
        (("--what", "logits", "--workers", 0), model(pixels(paths)), 1e-4),
        (("--no-accelerate", "--mean", "0.2,0.3,0.4"), None, 1e-4),
    ):
        other = tmp_path / "_".join(map(str, arguments))
        assert embed("-o", other, *arguments)[0] == 0
        if expected is None:
            seen = pixels(paths, mean=(0.2, 0.3, 0.4))
            expected = model.forward_head(model.forward_features(seen), pre_logits=True)
        same(rows(other), paths, expected, tolerance)
    kind = pyarrow.parquet.read_schema(tmp_path / "--pool_avg_--feature-dtype_float16" / "part-00000.parquet")
    assert kind.field("feature").type.value_type == pyarrow.float16()


@pytest.mark.parity
@torch.no_grad()
@pytest.mark.parametrize("kind", ["Dinov2ForImageClassification", "CLIPVisionModel", "ViTModel", "Dinov2Model"])
def test_transformers_features(run, kind: str, here: Path, tmp_path: Path) -> None:  # noqa: F811
    theirs = hf(kind)
    save_hf(theirs, tmp_path / "model")
    size = {"size": {"height": SIDE, "width": SIDE}, "image_mean": [0.5] * 3, "image_std": [0.5] * 3, "resample": 3}
    (tmp_path / "model" / "preprocessor_config.json").write_text(json.dumps(size))
    paths = photographs(here)[:3]
    stacked = torch.stack(
        [
            torch.from_numpy(np.array(Image.open(p).resize((SIDE, SIDE), Image.Resampling.BICUBIC))).permute(2, 0, 1)
            for p in paths
        ]
    )
    x = (stacked / 255 - 0.5) / 0.5
    if kind == "Dinov2ForImageClassification":  # its head is given the class token and the mean of the patches
        last = theirs.dinov2(x).last_hidden_state
        own, tokens = torch.cat([last[:, 0], last[:, 1:].mean(1)], 1), last
    else:
        found = theirs(x)
        tokens = found.last_hidden_state
        own = found.last_hidden_state[:, 0] if kind == "ViTModel" else found.pooler_output
    for arguments, expected in (((), own), (("--pool", "avg"), tokens[:, 1:].mean(1))):
        folder = tmp_path / f"f{len(arguments)}"
        asked = ("--checkpoint", tmp_path / "model", "--device", "cpu", "--workers", 0, *arguments)
        code, _, err = run("embed", *paths, "-o", folder, *asked)
        assert (code, err) == (0, "")
        same(rows(folder), paths, expected)


def test_unreadable_images_are_listed_and_a_second_run_knows_them(embed, here: Path, tmp_path: Path) -> None:
    bad = [here / "photos" / "a" / name for name in ("empty.png", "text.jpg")]
    try:
        bad[0].write_bytes(b"")
        bad[1].write_text("no image")
        arguments = ("-o", tmp_path / "f", "--shard", 5, "--batch-size", 2)
        code, out, err = embed(*arguments)
        assert code == 1
        assert out == f"{tmp_path / 'f'}: 11 images x 192 in 3 parts\n"
        lines = err.splitlines()
        assert lines[-1] == f"fastvit: embed: 2 of 13 images FAILED, see {tmp_path / 'f' / '_unreadable'}"
        assert lines[0] == f"fastvit: {bad[0]}: the file is empty" and len(lines) == 3
        listed = [line for path in sorted((tmp_path / "f" / "_unreadable").iterdir()) for line in read_csv(path)]
        assert listed[:2] == [["path", "reason"], [str(bad[0]), "the file is empty"]]
        assert [line[0] for line in listed if line[0] != "path"] == [str(path) for path in bad]
        assert len(rows(tmp_path / "f")) == 11
        before = {path: path.stat().st_mtime_ns for path in (tmp_path / "f").glob("*.parquet")}
        code, out, err = embed(*arguments)
        assert (code, err.splitlines()) == (1, lines[-1:])
        assert {path: path.stat().st_mtime_ns for path in (tmp_path / "f").glob("*.parquet")} == before
        bad[0].unlink()
        code, _, err = embed(*arguments)
        assert (code, err.count("\n")) == (1, 1)
        assert "images 13, and now it is 12" in err
    finally:
        for path in bad:
            path.unlink(missing_ok=True)


def read_csv(path: Path) -> list[list[str]]:
    return list(csv.reader(path.read_text().splitlines()))


def test_a_part_of_nothing_but_unreadable_images_is_one(run, here: Path, tmp_path: Path) -> None:  # noqa: F811
    (tmp_path / "empty.png").write_bytes(b"")
    photo().save(tmp_path / "good.png")
    code, _, _ = run("embed", tmp_path / "*.png", "-o", tmp_path / "f", *options(here, "--shard", 1, "--workers", 0))
    assert code == 1
    assert list(rows(tmp_path / "f")) == [str(tmp_path / "good.png")]
    assert pyarrow.parquet.read_table(tmp_path / "f" / "part-00000.parquet").num_rows == 0


def test_features_that_are_no_numbers_are_not_kept(run, model, here: Path, tmp_path: Path) -> None:  # noqa: F811
    broken = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    broken["norm.bias"][3] = 1e6
    save_file(broken, tmp_path / "vit.safetensors")
    asked = ("-o", tmp_path / "f", "--feature-dtype", "float16", "--workers", 0, "--random-weights")
    path = photographs(here)[0]
    code, _, err = run("embed", path, *asked[:-1], *options(tmp_path))
    assert code == 1
    assert "not finite" in err
    assert rows(tmp_path / "f") == {}


def start(*arguments: object, launch: tuple[str, ...] = ()) -> subprocess.Popen:
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *launch, "-m", "fastvit", "embed", *map(str, arguments)]
    return subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.slow
def test_killed_in_the_middle_and_run_again(run, here: Path, tmp_path: Path) -> None:  # noqa: F811
    count, folder = 80, tmp_path / "killed"  # many, so that the signal comes before the end
    (tmp_path / "photos").mkdir()
    for number in range(count):
        photo(20 + number, 30).save(tmp_path / "photos" / f"{number:03d}.png")
    command = (tmp_path / "photos", *options(here), "--shard", 1, "--batch-size", 1)
    assert run("embed", *command, "-o", tmp_path / "whole")[0] == 0
    first = start(*command, "-o", folder)
    try:
        while not (folder / "part-00001.parquet").exists():
            assert first.poll() is None, first.communicate()[1]
            time.sleep(0.001)
    finally:
        first.send_signal(signal.SIGKILL)
        first.communicate()
    (folder / ".part-00003.half.parquet").write_bytes(b"PAR1")  # as a run leaves it that is killed while it writes
    kept = {path.name: path.read_bytes() for path in folder.glob("part-*.parquet")}
    assert 2 <= len(kept) < count
    code, out, err = run("embed", *command, "-o", folder)
    assert (code, err) == (0, ""), out
    assert all((folder / name).read_bytes() == content for name, content in kept.items())
    assert not list(folder.glob(".*"))
    whole, resumed = rows(tmp_path / "whole"), rows(folder)
    assert list(whole) == list(resumed) and len(whole) == count
    assert all(np.array_equal(whole[name], resumed[name]) for name in whole)


@pytest.mark.slow
def test_two_processes_share_the_parts(embed, here: Path, tmp_path: Path) -> None:
    cut = ("--shard", 2, "--batch-size", 2)
    assert embed("-o", tmp_path / "one", *cut)[0] == 0
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    process = start(here / "photos", *options(here), "-o", tmp_path / "two", *cut, "--workers", 0, launch=torchrun)
    out, err = process.communicate(timeout=100)
    assert process.returncode == 0, err
    assert out == f"{tmp_path / 'two'}: 11 images x 192 in 6 parts\n"
    one, two = rows(tmp_path / "one"), rows(tmp_path / "two")
    assert list(one) == list(two)
    for name in one:
        np.testing.assert_allclose(two[name], one[name], rtol=1e-5, atol=1e-5)


def test_a_folder_takes_no_other_features(run, embed, model, here: Path, tmp_path: Path) -> None:  # noqa: F811
    folder = tmp_path / "f"
    assert embed("-o", folder, "--workers", 0)[0] == 0
    content = (folder / "part-00000.parquet").read_bytes()
    save_file({**model.state_dict(), "norm.bias": torch.zeros(192)}, tmp_path / "vit.safetensors")
    for arguments, word in (
        (("--pool", "avg"), 'pool "own", and now it is "avg"'),
        (("--shard", "3"), "shard 10000, and now it is 3"),
        (("--dtype", "bf16"), "dtype"),
        (("--mean", "0.1"), "preparation"),
        (("--checkpoint", tmp_path / "vit.safetensors"), "weights sha256"),
    ):
        code, out, err = embed("-o", folder, "--workers", 0, *arguments)
        assert (code, out, err.count("\n")) == (1, "", 1)
        assert word in err and "--output" in err
    (folder / "_manifest.json").write_text("{")
    assert "not a manifest" in embed("-o", folder)[2]
    assert (folder / "part-00000.parquet").read_bytes() == content


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("-o", "{tmp}/one.jpg"), ("one.jpg: a file",)),
        (("-o", "{tmp}/one.jpg/new"), ("is no directory",)),
        (("-o", "{tmp}"), ("holds other files", "_manifest.json")),
        (("-o", "{tmp}/f", "--what", "tokens"), ("unknown what", "features")),
        (("-o", "{tmp}/f", "--pool", "max"), ("unknown pool", "avg")),
        (("-o", "{tmp}/f", "--what", "logits", "--pool", "avg"), ("--pool is for features",)),
        (("-o", "{tmp}/f", "--feature-dtype", "int8"), ("unknown feature-dtype",)),
        (("-o", "{tmp}/f", "{tmp}/none"), ("none: no such file",)),
        (("-o", "{tmp}/f", "{tmp}/new"), ("no images in or below",)),
    ],
)
def test_wrong_requests_fail_in_one_line_and_write_nothing(embed, tmp_path: Path, arguments, words) -> None:
    photo().save(tmp_path / "one.jpg")
    (tmp_path / "new").mkdir()
    code, out, err = embed(*(a.format(tmp=tmp_path) for a in arguments))
    assert (code, out) == (1, ""), err
    assert err.startswith("fastvit: ") and err.count("\n") == 1, err
    assert all(word in err for word in words), err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["new", "one.jpg"]


def test_without_pyarrow(embed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    code, out, err = embed("-o", tmp_path / "f")
    assert (code, out) == (1, "")
    assert err == 'fastvit: parquet files need pyarrow:  pip install "fastvit[embed]"\n'
