"""Files that are damaged, lie about their size or bring code: each refused at once, with a reason, nothing changed."""

import io
import json
import os
import pickle
import struct
import time
import zipfile
from collections import OrderedDict

import numpy
import pytest
import safetensors.torch
import torch
from models import SMALL, randomize

import fastvit
from fastvit import CheckpointError, VisionTransformer, load_checkpoint


def vit(**options):
    return randomize(VisionTransformer(**{**SMALL, "depth": 1, **options}), seed=3).eval()


def weights():
    return {name: tensor.clone() for name, tensor in randomize(vit(), seed=4).state_dict().items()}


def header(facts, data=b"", length=None):
    text = facts if isinstance(facts, bytes) else json.dumps(facts).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def tensor_facts(**changes):
    return {"dtype": "F32", "shape": [2], "data_offsets": [0, 8], **changes}


def npy(descr="<f4", shape=(2,), data=b"\0" * 8, version=1, length=None, text=None):
    text = text or f"{{'descr': {descr!r}, 'fortran_order': False, 'shape': {shape!r}, }}".encode()
    form = "<H" if version == 1 else "<I"
    return b"\x93NUMPY" + bytes([version, 0]) + struct.pack(form, len(text) if length is None else length) + text + data


def archive(*parts, compression=zipfile.ZIP_STORED):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", compression) as made:
        for name, data in parts:
            made.writestr(name, data)
    return file.getvalue()


def torch_file(pickled, *parts, **options):
    return archive(("archive/data.pkl", pickled), ("archive/version", b"3\n"), *parts, **options)


def saved(value):
    file = io.BytesIO()
    torch.save(value, file)
    return file.getvalue()


def changed(blob, part, change):
    """The same archive of torch.save with one part rewritten."""
    with zipfile.ZipFile(io.BytesIO(blob)) as old:
        parts = [
            (i.filename, change(old.read(i)) if i.filename.endswith(part) else old.read(i)) for i in old.infolist()
        ]
    return archive(*parts)


class Evil:
    """A pickle of this creates a file when it is loaded by pickle."""

    def __init__(self, place):
        self.place = str(place)

    def __reduce__(self):
        return open, (self.place, "w")


def dictionary_of_tuples():
    """A key that is a tuple of tuples, 60 deep, each twice the one before: its hash takes 2 to the 60 steps."""
    return b"\x80\x02}" + b")" + b"2\x86" * 60 + b"K\x01s."


def nested(depth):
    return b"[" * depth + b"]" * depth


def object_array(place):
    file = io.BytesIO()
    numpy.savez(file, allow_pickle=True, **{"embedding/kernel": numpy.array([Evil(place)], dtype=object)})
    return file.getvalue()


def transposed():
    state = weights()
    name = "blocks.0.mlp.fc1.weight"
    return safetensors.torch.save({**state, name: state[name].t().contiguous()})


def whole(**more):
    return safetensors.torch.save({**weights(), **more})


def flipped(blob):
    """The same archive with one byte of data changed, which its checksum does not know."""
    with zipfile.ZipFile(io.BytesIO(blob)) as made:
        start = max(made.infolist(), key=lambda part: part.file_size).header_offset + 400
    return blob[:start] + bytes([blob[start] ^ 255]) + blob[start + 1 :]


def npz_of(model):
    """An archive of NumPy with timm's names, which is no known layout's file but a readable one."""
    file = io.BytesIO()
    numpy.savez(file, **{name: tensor.numpy() for name, tensor in model.items()})
    return file.getvalue()


LIE = {"patch_embed.proj.weight": tensor_facts(shape=[1 << 20, 1 << 20], data_offsets=[0, 1 << 42])}
TWICE = b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}'
EXEC = b"{'descr': __import__('os').system('touch ran'), 'fortran_order': False, 'shape': (2,), }"
STRIDED = {"patch_embed.proj.weight": torch.zeros(1).expand(1 << 20, 1 << 20)}

# name -> (file name, bytes or a function of a place that must not come to be, words of the reason, weights_only)
BAD = {
    "an empty file": ("a.safetensors", b"", "empty", None),
    "a header of 4 TiB": ("a.safetensors", header({}, length=1 << 42), "header of 4398046511104 bytes", None),
    "a file of five bytes": ("a.safetensors", b"12345", "no safetensors", None),
    "a header that is no JSON": ("a.safetensors", header(b"{'a'"), "no JSON", None),
    "a header that is a list": ("a.safetensors", header(b"[1]"), "JSON object", None),
    "a header nested 100,000 deep": ("a.safetensors", header(nested(100_000)), "no JSON|cannot be read", None),
    "a header without an offset": (
        "a.safetensors",
        header({"a": {"dtype": "F32", "shape": [2]}}, b"\0" * 8),
        "must have",
        None,
    ),
    "truncated data": ("a.safetensors", whole()[:-100], "needs", None),
    "bytes behind the end": ("a.safetensors", whole() + b"\0" * 8, "behind its last", None),
    "a tensor of 4 TiB": ("a.safetensors", header(LIE, b"\0" * 64), "needs", None),
    "a shape of negative sizes": (
        "a.safetensors",
        header({"a": tensor_facts(shape=[-1, -2])}, b"\0" * 8),
        "claims",
        None,
    ),
    "a shape of floats": ("a.safetensors", header({"a": tensor_facts(shape=[2.0])}, b"\0" * 8), "no list", None),
    "an unknown dtype": ("a.safetensors", header({"a": tensor_facts(dtype="X9")}, b"\0" * 8), "dtype", None),
    "tensors that overlap": (
        "a.safetensors",
        header({"a": tensor_facts(), "b": tensor_facts(data_offsets=[4, 12])}, b"\0" * 12),
        "begins at 4",
        None,
    ),
    "tensors with a hole between": (
        "a.safetensors",
        header({"a": tensor_facts(), "b": tensor_facts(data_offsets=[12, 20])}, b"\0" * 20),
        "begins at 12",
        None,
    ),
    "two tensors of one name": ("a.safetensors", header(TWICE, b"\0" * 8), "'a' twice", None),
    "a pickle called safetensors": ("a.safetensors", lambda place: pickle.dumps(Evil(place)), "no safetensors", None),
    "a transposed weight": (
        "a.safetensors",
        transposed(),
        "another shape.*fc1.weight .48, 192. instead of .192, 48.",
        None,
    ),
    "an integer weight": ("a.safetensors", whole(**{"norm.bias": torch.ones(48, dtype=torch.int32)}), "int32", None),
    "a missing and a strange name": (
        "a.safetensors",
        safetensors.torch.save({("x" if k == "norm.bias" else k): v for k, v in weights().items()}),
        "1 missing: norm.bias; 1 unexpected: x",
        None,
    ),
    "no vision transformer": (
        "a.safetensors",
        safetensors.torch.save({"w": torch.zeros(2)}),
        "Looked for .* Found w",
        None,
    ),
    "a bomb": (
        "a.npz",
        archive(("embedding/kernel.npy", npy(shape=(1 << 25,), data=bytes(1 << 27))), compression=zipfile.ZIP_DEFLATED),
        "packed into",
        None,
    ),
    "an array of objects": ("a.npz", object_array, "objects", None),
    "a line of 4 GiB": ("a.npz", archive(("a.npy", npy(version=2, length=0xFFFFFFFF))), "header of 4294967295", None),
    "an array that claims 4 TiB": ("a.npz", archive(("a.npy", npy(shape=(1 << 40,)))), "claims|needs", None),
    "a program for a header": ("a.npz", archive(("a.npy", npy(text=EXEC))), "damaged header", None),
    "parentheses for a header": ("a.npz", archive(("a.npy", npy(text=b"(" * 4000))), "damaged header", None),
    "a part that is no array": ("a.npz", archive(("a.npy", npy()), ("run.py", b"import os")), "no array", None),
    "two arrays of one name": ("a.npz", lambda place: twice_in_an_archive(), "two parts named", None),
    "half an archive": ("a.npz", archive(("a.npy", npy()))[:-30], "no zip archive", None),
    "text called npz": ("a.npz", b"hello", "no zip archive", None),
    "timm's names as npz, with a wrong checksum": (
        "a.npz",
        flipped(npz_of(weights())),
        "cannot be read|damaged|no array",
        None,
    ),
    "a pickle without a word": ("a.pt", saved(weights()), "weights_only=True", None),
    "a pickle that runs": ("a.pt", lambda place: pickle.dumps({"model": Evil(place)}), "no zip archive", True),
    "an archive with a pickle that runs": ("a.pt", lambda place: saved({"w": Evil(place)}), "asks for .*open", True),
    "a whole module": ("a.pth", lambda place: saved(torch.nn.Linear(2, 2)), "asks for", True),
    "a tensor of stride 0": ("a.bin", saved(STRIDED), "more than once", True),
    "a tensor behind its storage": (
        "a.pt",
        changed(saved({"w": torch.zeros(4)}), "data.pkl", lambda data: data.replace(b"K\x04\x85", b"K\x40\x85")),
        "more than once|behind its storage",
        True,
    ),
    "a storage larger than its part": (
        "a.pt",
        changed(saved({"w": torch.zeros(4)}), "data.pkl", lambda data: data.replace(b"K\x04", b"K\x40")),
        "needs 256 bytes",
        True,
    ),
    "a compressed archive": (
        "a.pt",
        torch_file(b"\x80\x02}.", ("archive/data/0", bytes(1 << 20)), compression=zipfile.ZIP_DEFLATED),
        "compressed",
        True,
    ),
    "TorchScript": ("a.pt", torch_file(b"\x80\x02}.", ("archive/constants.pkl", b"")), "TorchScript", True),
    "a memo with a far index": ("a.pt", torch_file(b"\x80\x02}r\xff\xff\xff\x7f."), "no tensor", True),
    "a key with a hash of 60 doublings": ("a.pt", torch_file(dictionary_of_tuples()), "neither a string", True),
    "a list": ("a.pt", torch_file(b"\x80\x02]."), "holds a list", True),
    "half of torch.save": ("a.pt", saved(weights())[:-200], "no zip archive", True),
    "an unknown ending": ("a.h5", b"\x89HDF", "must end in", None),
}


def twice_in_an_archive():
    with pytest.warns(UserWarning, match="Duplicate name"):
        return archive(("a.npy", npy()), ("a.npy", npy()))


@pytest.mark.parametrize("case", BAD)
def test_a_bad_file_is_refused(case, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    name, data, words, weights_only = BAD[case]
    place = tmp_path / "ran"
    (tmp_path / name).write_bytes(data(place) if callable(data) else data)
    refused(tmp_path / name, words, weights_only)
    assert not place.exists()


def refused(path, words, weights_only=None):
    model = vit()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    start = time.perf_counter()
    with pytest.raises(CheckpointError, match=words) as reason:
        load_checkpoint(model, path, weights_only=weights_only)
    assert time.perf_counter() - start < 2
    assert len(str(reason.value)) < 3000
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


# what only a model can tell
FITS_NO_MODEL = {"a transposed weight", "an integer weight", "a missing and a strange name"}


@pytest.mark.parametrize("case", [case for case in BAD if case not in FITS_NO_MODEL])
def test_a_bad_file_is_not_converted_either(case, tmp_path):
    name, data, words, weights_only = BAD[case]
    place = tmp_path / "ran"
    (tmp_path / name).write_bytes(data(place) if callable(data) else data)
    with pytest.raises(CheckpointError, match=words):
        fastvit.convert_file(tmp_path / name, tmp_path / "out", weights_only=weights_only, num_heads=3)
    assert [path.name for path in tmp_path.iterdir()] == [name]


DIRECTORIES = {
    "an empty directory": ({}, "directory without model.safetensors", None),
    "a directory with a pickle": ({"pytorch_model.bin": b"x"}, "needs weights_only=True", None),
    "an index that leads away": (
        {"model.safetensors.index.json": b'{"weight_map": {"a": "../other.safetensors"}}'},
        "no checkpoint beside it",
        None,
    ),
    "an index of nothing": ({"model.safetensors.index.json": b'{"metadata": {}}'}, "weight_map", None),
    "an index with a name too many": (
        {"model.safetensors.index.json": b'{"weight_map": {"a": "b.safetensors"}}', "b.safetensors": whole()},
        "lacks a",
        None,
    ),
}


@pytest.mark.parametrize("case", DIRECTORIES)
def test_a_bad_directory_is_refused(case, tmp_path):
    files, words, weights_only = DIRECTORIES[case]
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    refused(tmp_path, words, weights_only)


def test_a_pipe_is_refused_and_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "a.safetensors")
    refused(tmp_path / "a.safetensors", "no regular file")


def test_what_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.safetensors"):
        load_checkpoint(vit(), tmp_path / "none.safetensors")


def same(model, state):
    return all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("container", [None, "state_dict", "model"])
def test_torch_files_load(container, tmp_path):
    state = weights()
    state["norm.weight"] = torch.full((48,), torch.nan)  # which is a weight like any other
    packed = torch.randn(2, 48, 48).transpose(1, 2)  # a view with strides and an offset
    state["blocks.0.attn.proj.weight"] = packed[1]
    for value in (OrderedDict(state), {k: torch.nn.Parameter(v) for k, v in state.items()}):
        torch.save({container: value, "epoch": 3} if container else value, tmp_path / "a.pth")
        model = load_checkpoint(vit(), tmp_path / "a.pth", weights_only=True)
        state_now = model.state_dict()
        assert torch.equal(state_now.pop("norm.weight").isnan(), torch.ones(48, dtype=torch.bool))
        assert all(torch.equal(value, state[key]) for key, value in state_now.items())


def test_a_wrapped_models_state_dict_loads_with_its_averaged_weights_first(tmp_path):
    state, other = weights(), {k: v + 1 for k, v in weights().items()}
    torch.save({"state_dict": other, "state_dict_ema": {f"module.{k}": v for k, v in state.items()}}, tmp_path / "a.pt")
    assert same(load_checkpoint(vit(), tmp_path / "a.pt", weights_only=True), state)


def test_shards_load(tmp_path):
    state = weights()
    names = list(state)
    parts = {"a.safetensors": names[:5], "b.safetensors": names[5:]}
    for file, part in parts.items():
        safetensors.torch.save_file({name: state[name] for name in part}, tmp_path / file)
    index = {"metadata": {}, "weight_map": {name: file for file, part in parts.items() for name in part}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert same(load_checkpoint(vit(), tmp_path), state)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_dtypes_are_those_of_the_model(dtype, tmp_path):
    state = {name: tensor.to(dtype) for name, tensor in weights().items()}
    safetensors.torch.save_file(state, tmp_path / "a.safetensors")
    model = load_checkpoint(vit(), tmp_path / "a.safetensors")
    assert same(model, {name: tensor.float() for name, tensor in state.items()})


def test_our_safetensors_are_everybodys(tmp_path):
    state = {**weights(), "head.bias": torch.ones(11, dtype=torch.bfloat16)}
    torch.save(state, tmp_path / "a.pt")
    fastvit.convert_file(tmp_path / "a.pt", tmp_path / "b.safetensors", to="timm", weights_only=True)
    read = safetensors.torch.load_file(tmp_path / "b.safetensors")
    assert read.keys() == state.keys()
    assert all(torch.equal(read[name], state[name]) and read[name].dtype == state[name].dtype for name in state)


def test_bad_calls(tmp_path):
    safetensors.torch.save_file(weights(), tmp_path / "a.safetensors")
    path = tmp_path / "a.safetensors"
    for error, words, call in (
        (TypeError, "model must be", lambda: load_checkpoint(3, path)),
        (TypeError, "path must be", lambda: load_checkpoint(vit(), 3)),
        (ValueError, "interpolation must be one of", lambda: load_checkpoint(vit(), path, interpolation="nearest")),
        (ValueError, "src must be one of", lambda: load_checkpoint(vit(), path, src="keras")),
        (ValueError, "source_grid must be", lambda: load_checkpoint(vit(), path, source_grid=(3, 0))),
        (ValueError, "weights_only must be True", lambda: load_checkpoint(vit(), path, weights_only=False)),
        (ValueError, "meta device", lambda: load_checkpoint(vit(device="meta"), path)),
        (ValueError, "to must be one of", lambda: fastvit.convert_file(path, tmp_path / "b", to="onnx")),
        (ValueError, "must end in", lambda: fastvit.convert_file(path, tmp_path / "b", to="timm")),
        (FileExistsError, "overwrite=True", lambda: fastvit.convert_file(path, path, to="timm")),
        (ValueError, "dst must be one of", lambda: fastvit.convert_state_dict({}, dst="jax")),
        (TypeError, "map names to tensors", lambda: fastvit.convert_state_dict({"a": 3})),
        (TypeError, "must map", lambda: fastvit.convert_state_dict([1])),
    ):
        with pytest.raises(error, match=words):
            call()
