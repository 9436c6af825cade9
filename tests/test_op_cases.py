"""Op-level cases: their work against what torch counts, their grids, a block against timm's."""

import dataclasses

import pytest
import torch
from tiny_ops import CPU, tiny

import fastvit
from fastvit.benchmarks import cases, launches, op_calls, op_cases, table


@pytest.mark.parametrize("direction", op_cases.DIRECTIONS)
@pytest.mark.parametrize("op", op_cases.OPS)
def test_flops_are_what_torch_counts(op: str, direction: str) -> None:
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    case = tiny(op, direction)
    call = op_calls.call(case)
    given = op_calls.leaves(op_calls.tensors(case, CPU), call.wanted)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as forward:
        y = call.eager(**given)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as backward:
        torch.autograd.grad(y, [given[name] for name in call.wanted], op_calls.upstream(y))
    counted = {"forward": forward.get_total_flops(), "backward": backward.get_total_flops()}
    # math attention keeps the scores, a fused one computes that product again
    scores = 2 * case.batch * case.tokens**2 * case.width if op in ("attention", "block") else 0
    counted["backward"] += scores
    assert case.work.flops == counted.get(direction, sum(counted.values()))


@pytest.mark.parametrize("op", op_cases.OPS)
def test_traffic_is_every_tensor_once(op: str) -> None:
    case = tiny(op)
    call = op_calls.call(case)
    given = op_calls.leaves(op_calls.tensors(case, CPU), call.wanted)
    y = call.eager(**given)
    assert case.work.bytes(4) == 4 * (sum(t.numel() for t in given.values()) + y.numel())
    least = y.numel() + sum(given[name].numel() for name in call.wanted)  # dy in, gradients out
    back = dataclasses.replace(case, direction="backward").work.bytes(4) // 4
    assert least <= back <= 4 * (least + y.numel())
    both = dataclasses.replace(case, direction="forward+backward").work
    kept = both.bytes(4) - case.work.bytes(4) - 4 * back
    assert kept >= 0
    assert (kept > 0) == (op in ("attention", "layer_norm", "group_norm", "linear_fc1", "norm_mlp", "block"))


def test_a_block_keeps_what_its_backward_cannot_do_without() -> None:
    case = tiny("block", "forward+backward")
    forward, back = (dataclasses.replace(case, direction=one).work for one in ("forward", "backward"))
    M, D, F, H = case.batch * case.tokens, case.width, case.hidden, case.heads
    kept = case.work.numbers - forward.numbers - back.numbers
    assert kept == M * (3 * D + D + D + F)  # qkv, heads, the sum in the middle, what goes into GELU
    assert case.work.statistics - back.statistics == case.batch * H * case.tokens + 2 * 2 * M
    parts = ("attention", "layer_norm", "linear_qkv", "linear_proj", "norm_mlp", "layer_norm")
    apart = [dataclasses.replace(case, op=part).work for part in parts]
    assert case.work.bytes(4) < sum(part.bytes(4) for part in apart), "a fused block moves less than its ops one by one"


def test_the_ops_of_a_block_add_up_to_the_model() -> None:
    model = "vit_base_patch16_224"
    config = fastvit.PRESETS[model]
    flops = {op: op_cases.at_model(op, model, 2, "float32", "forward").work.flops for op in op_cases.OPS}
    block = sum(flops[op] for op in ("attention", "layer_norm", "linear_qkv", "linear_proj", "norm_mlp"))
    assert flops["block"] == block
    assert flops["linear_fc1"] + flops["linear_fc2"] == flops["norm_mlp"]
    head = 2 * 2 * config.embed_dim * config.num_classes
    assert flops["patch_embed"] + config.depth * block + head == cases.flops(config, 2)


def test_launch_cases_with_work_have_all_of_it() -> None:
    for launch in launches.launches():
        assert (launch.flops is None) == (launch.bytes is None), f"{launch.op} {launch.label}"
        if launch.bytes is not None:
            assert 0 < launch.bytes(2) < launch.bytes(4) <= 2 * launch.bytes(2), f"{launch.op} {launch.label}"


def among(gpu: bool = False, **wanted: object) -> list[op_cases.OpCase]:
    """The default cases whose attributes have these values."""
    return [case for case in op_cases.grid(gpu)[0] if all(getattr(case, name) == wanted[name] for name in wanted)]


def test_the_grids_hold_what_the_pictures_show() -> None:
    both = {"forward", "forward+backward"}
    for op in op_cases.OPS:
        whole = {(case.batch, case.direction) for case in among(op=op, width=768, dtype="float32")}
        assert whole >= {(batch, direction) for batch in (1, 8) for direction in both}, op
    for op in ("attention", "layer_norm", "linear_fc1", "norm_mlp", "block"):
        grown = among(op=op, batch=1, width=768, dtype="float32", direction="forward")
        assert {case.tokens for case in grown} == {50, 197, 577, 1025}, op
        assert {case.batch for case in among(op=op, dtype="bfloat16", direction="forward")} == {1, 8}
        if op != "block":
            wide = among(op=op, batch=1, tokens=197, dtype="float32", direction="forward")
            assert {case.width for case in wide} == {192, 384, 768, 1024, 1664}, op
    assert {case.tokens for case in among(gpu=True, op="attention")} == {50, 197, 257, 577, 1025}
    assert {case.batch for case in among(gpu=True, op="attention", tokens=577)} == {64}
    assert {case.width for case in among(gpu=True, op="block")} == {192, 384, 768, 1024, 1664}
    for gpu in (False, True):
        every, left_out = op_cases.grid(gpu)
        assert len(set(every)) == len(every)
        assert not left_out
        assert all(case.batch == table.batch_of({"shape": case.shape}) for case in every)


def test_what_is_asked_for_replaces_the_grids_own() -> None:
    some, _ = op_cases.grid(
        False, ["linear", "patch_embed"], ["vit_base_patch16_384"], [2], ["float16"], ["forward"], [10]
    )
    assert [case.op for case in some] == [*op_cases.GROUPS["linear"], "patch_embed"]
    assert {case.shape for case in some} == {
        "2x10x768x2304", "2x10x768x768", "2x10x768x3072", "2x10x3072x768", "2x3x48x48x16x768",
    }  # fmt: skip
    (block,), _ = op_cases.grid(False, ["block"], ["vit_gigantic_patch14_224"], [2], ["bfloat16"], ["backward"], [50])
    assert block.shape == "2x50x1664x16x8192"
    assert {case.batch for case in op_cases.grid(True, ["attention"], batches=[256], tokens=[50])[0]} == {64, 256}
    assert {case.batch for case in op_cases.grid(True, ["layer_norm"], ["vit_base_patch16_224"], [2])[0]} == {2}
    one = op_cases.Grid(("patch_embed",), tokens=(197, 577))
    assert [case.side for case in op_cases.product(one)] == [224, 384]


def test_tokens_that_make_no_square_image_are_left_out_by_name() -> None:
    found, left_out = op_cases.grid(False, ["patch_embed", "layer_norm"], tokens=[197, 200, 1])
    assert {case.tokens for case in found if case.op == "patch_embed"} == {197}
    assert {case.tokens for case in found if case.op == "layer_norm"} == {1, 197, 200}
    assert left_out == {
        "patch_embed of vit_base_patch16_224 at 200 tokens": "no square image has 199 patches",
        "patch_embed of vit_base_patch16_224 at 1 tokens": "no square image has 0 patches",
    }
    with pytest.raises(ValueError, match="no square image has 199 patches"):
        op_cases.grid(False, ["patch_embed"], tokens=[200])


@pytest.mark.parametrize("lacking", ["encoder", "norm_mlp"])
def test_a_block_runs_op_by_op_where_nothing_computes_it_whole(lacking: str, monkeypatch: pytest.MonkeyPatch) -> None:
    served = dict.fromkeys(fastvit.backends.OPS, ("cpu",))
    monkeypatch.setattr(fastvit.backends, "OPS", served | {lacking: ()} | {"encoder": ()})
    monkeypatch.setattr(fastvit.backends, "_load", lambda op, backend: "")
    for op in served:
        loaded = type("Loaded", (), {"why_not": staticmethod(lambda *args: None)})
        monkeypatch.setattr(fastvit.backends.Loaded, f"cpu_{op}", loaded, raising=False)
    case = tiny("block")
    reason = op_calls.call(case).why_not(op_calls.tensors(case, CPU), "cpu")
    assert reason == (None if lacking == "encoder" else "cpu has no norm_mlp kernel")


def test_a_block_is_timms() -> None:
    timm = pytest.importorskip("timm")
    case = tiny("block")
    block = timm.models.vision_transformer.Block(case.width, case.heads, case.hidden / case.width, qkv_bias=True)
    given = op_calls.tensors(case, CPU)
    names = {"qkv": "attn.qkv", "proj": "attn.proj", "fc1": "mlp.fc1", "fc2": "mlp.fc2"}
    renamed = {name.partition("_") for name in given if name != "x"}
    block.load_state_dict({f"{names.get(a, a)}.{b}": given[f"{a}_{b}"] for a, _, b in renamed})
    for norm in (block.norm1, block.norm2):
        norm.eps = op_calls.EPS
    with torch.no_grad():
        torch.testing.assert_close(op_calls.call(case).eager(**given), block(given["x"]))
