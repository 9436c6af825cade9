"""Where a block spends its time: what the profiler saw, as lines that add up."""

import pytest
import torch

import fastvit
from fastvit.benchmarks import breakdown, cases


def test_a_blocks_parts_are_timed_and_named() -> None:
    x = torch.randn(200, 300)
    found = breakdown.parts(lambda: torch.mm(x, x.T), torch.device("cpu"))
    assert found[0].name == "aten::mm"
    assert found[0].launches == 1
    assert [part.us for part in found] == sorted((part.us for part in found), reverse=True)
    text = breakdown.table("a product", found, wall_us=123.0, most=1)
    assert text.startswith("a product\n")
    assert "123.0 us by the clock" in text
    assert f"{len(found) - 1} more" in text or len(found) == 1


def test_both_blocks_hold_the_same_weights() -> None:
    found = breakdown.blocks("vit_tiny_patch16_224", torch.float32, torch.device("cpu"))
    eager, fused = found.values()
    x = torch.randn(1, cases.tokens(fastvit.PRESETS["vit_tiny_patch16_224"]), 192)
    torch.testing.assert_close(breakdown._forward(fused, x), breakdown._forward(eager, x), rtol=1e-4, atol=1e-4)
    assert list(found)[1] == "fastvit"


def test_the_command(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(breakdown, "PASSES", 1)
    assert breakdown.main(["--model", "vit_tiny_patch16_224", "--batch", "1", "--backend", "reference"]) == 0
    out = capsys.readouterr().out
    assert out.count("forward, one block") == 2
    assert out.count("forward and backward, one block") == 2
    assert breakdown.main(["--model", "vit_nano"]) == 1
    assert breakdown.main(["--backend", "triton"]) == 1
    err = capsys.readouterr().err
    assert "vit_nano" in err
    assert "interpreted" in err
