"""The architectures of three libraries, accelerated: numbers, gradients, keys, graphs; and the table that says so."""

import copy
import re

import compatibility
import pytest
import torch
from architectures import ARCHITECTURES
from compatibility import CHECKS, Incompatible, LibraryLimit, case, why_no_onnx

from fastvit.benchmarks import compatibility as table

QUICK = ("eval fp32", "bf16", "training step", "state_dict", "restore")
GRAPHS = [check for check in CHECKS if check not in QUICK and not (check == "ONNX" and why_no_onnx())]
each_architecture = pytest.mark.parametrize("name", ARCHITECTURES)


@pytest.mark.parity
@each_architecture
def test_numbers_gradients_keys_and_restore(name):
    for check in QUICK:
        try:
            CHECKS[check](case(name))
        except Incompatible as error:
            pytest.fail(f"{check}: {error}")


@pytest.mark.parity
@pytest.mark.grid(6)
@pytest.mark.parametrize("check", GRAPHS)
@pytest.mark.parametrize(("library", "name"), [(a.package, name) for name, a in ARCHITECTURES.items()])
def test_graphs(library, name, check):
    words = ARCHITECTURES[name].limits.get(check)
    if words is None:
        CHECKS[check](case(name))
    else:
        with pytest.raises(LibraryLimit, match=re.escape(words)):
            CHECKS[check](case(name))


@pytest.mark.parity
@each_architecture
def test_every_block_is_fused_or_says_why(name):
    wanted, fused = ARCHITECTURES[name], case(name).fused()
    assert fused.whole == fused.total - wanted.eager
    if wanted.eager:
        assert wanted.why
        assert any(wanted.why in reason for reason in fused.reasons), fused.reasons


def broken(monkeypatch, change):
    """A case of its own, whose accelerated model was changed."""
    given = compatibility.Case(ARCHITECTURES["timm: ViT (AugReg)"])
    accelerate = compatibility.fastvit.accelerate

    def wrong(model):
        change(accelerate(model))
        return model

    monkeypatch.setattr(compatibility.fastvit, "accelerate", wrong)
    return given


def off_by_a_little(model):
    fused = model.blocks[1].__dict__["forward"]
    model.blocks.__dict__.pop("forward")
    model.blocks[1].__dict__["forward"] = lambda x: fused(x) + 0.02 * x.flip(-1)


def with_a_trace(model):
    model.blocks[0].mlp.__dict__["trace"] = 1


def with_another_key(model):
    model.head.register_buffer("more", torch.zeros(1))


@pytest.mark.parametrize(
    ("check", "change", "words"),
    [
        ("eval fp32", off_by_a_little, "largest error"),
        ("bf16", off_by_a_little, "error"),
        ("training step", off_by_a_little, "error"),
        ("compile", off_by_a_little, "largest error"),
        ("export", off_by_a_little, "largest error"),
        ("state_dict", with_another_key, "keys"),
        ("restore", with_a_trace, r"blocks.0.mlp: \['trace'\] differ"),
    ],
)
def test_the_checks_notice(check, change, words, monkeypatch):
    given = broken(monkeypatch, change)
    with pytest.raises(Incompatible, match=words):
        CHECKS[check](given)


def test_what_the_library_cannot_do_is_no_fault_of_ours(monkeypatch):
    given = compatibility.Case(ARCHITECTURES["timm: ViT (AugReg)"])
    given.model.forward = lambda x: given.model.head(x) if x.sum() > 0 else x
    with pytest.raises(LibraryLimit):
        CHECKS["compile"](given)


VALUES = {
    "library": "timm",
    "model": "ViT",
    "fused": "2",
    "parts": "0",
    "blocks": "2",
    "restore": "same",
    "torch": "2.13",
}
ROW = {**dict.fromkeys(table.COLUMNS, ""), **dict.fromkeys(table.CHECKS, "0.5"), **VALUES}


def test_the_table_says_what_the_rows_say():
    failed = {**ROW, "model": "odd", "bf16": "FAILED much too large", "compile": "library a graph break"}
    partly = {**ROW, "fused": "1", "parts": "1", "eager": "OddBlock: gated", "ONNX": "absent onnx not installed"}
    text = table.section([ROW, failed, partly])
    lines = [line for line in text.splitlines() if line.startswith("| timm")]
    assert lines[0] == "| timm | ViT | 2/2 | 0.50x | 0.50x | 0.50x | 0.50x | 0.50x | 0.50x | 0.50x | = |"
    assert lines[1].split(" | ")[4:7] == ["FAILED (1)", "0.50x", "- (2)"]
    assert "1/2 + 1 in parts (3)" in lines[2]
    for note in ("(1) much too large", "(2) nor does the untouched model: a graph break", "(3) OddBlock: gated"):
        assert f"- {note}\n" in text
    assert "torch 2.13" in text
    assert table.failures([ROW, failed, partly]) == ["timm odd: bf16: much too large"]
    assert "make compatibility" in table.section([])


def test_rows_are_written_and_read(tmp_path):
    path = tmp_path / "new" / "rows.csv"
    assert table.read(path) == []
    table.write([ROW], path)
    table.write([ROW, {**ROW, "model": "DeiT"}], path)
    assert table.read(path) == [ROW, {**ROW, "model": "DeiT"}]
    assert list(path.parent.iterdir()) == [path]


def test_the_committed_rows_are_of_these_architectures_and_hold_no_failure():
    rows = table.read()
    assert [f"{row['library']}: {row['model']}" for row in rows] == list(ARCHITECTURES), "run `make compatibility`"
    assert table.failures(rows) == []
    for row, architecture in zip(rows, ARCHITECTURES.values(), strict=True):
        assert int(row["blocks"]) - int(row["fused"]) == architecture.eager, row["model"]
        for check, words in architecture.limits.items():
            assert row[check].startswith(table.LIBRARY)
            assert words in row[check]
        unknown = [c for c in table.CHECKS if row[c].startswith(table.LIBRARY) and c not in architecture.limits]
        assert not unknown, row["model"]


def test_architectures_are_random_everywhere_and_the_same_each_time():
    architecture = ARCHITECTURES["transformers: DINOv2, registers"]
    first, second = architecture.build(), architecture.build()
    for name, p in first.named_parameters():
        assert not ((p == 0) | (p == 1)).any(), name
        assert torch.equal(p, second.get_parameter(name))
    assert copy.deepcopy(first).training is False
