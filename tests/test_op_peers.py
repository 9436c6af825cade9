"""Who else computes an op: each library's adapter against a stand-in with its documented signature, and the rules."""

import importlib.machinery
import sys
import types
from collections.abc import Callable

import pytest
import tolerances
import torch
import torch.nn.functional as F
from tiny_ops import CPU, tiny
from torch import Tensor, nn

from fastvit.benchmarks import op_calls, op_peers, op_suite, peers, rows

ALL = (*op_peers.COMPILERS, *op_peers.PEERS)
PEERS = {peer.name: peer for peer in op_peers.PEERS}
FROZEN = next(peer for peer in op_peers.COMPILERS if peer.device == "cpu")
Watch = Callable[..., None]


def softmax_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """(B, N, H, E), as all of these libraries order them, by its definition."""
    scores = torch.einsum("bnhe,bmhe->bhnm", q, k) * q.shape[-1] ** -0.5
    return torch.einsum("bhnm,bmhe->bnhe", scores.softmax(-1), v)


class FlashAttention:
    """flash_attn_qkvpacked_func of versions 2 and 3, flash_attn_func of version 4."""

    def __init__(self, watch: Watch, with_lse: bool) -> None:
        self._watch, self._with_lse = watch, with_lse

    def flash_attn_qkvpacked_func(self, qkv: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        assert qkv.ndim == 5 and qkv.shape[2] == 3
        return self.flash_attn_func(*qkv.unbind(2))

    def flash_attn_func(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        self._watch(q, k, v)
        out = softmax_attention(q, k, v)
        return (out, out.sum(-1)) if self._with_lse else out


class TransformerEngine:
    """Its modules: their arguments, their parameters by name, their layouts."""

    def __init__(self, watch: Watch) -> None:
        class Norm(nn.Module):
            def __init__(self, normalized_shape, eps=1e-5, *, params_dtype=None, device="cuda") -> None:
                super().__init__()
                self.eps, self.shape = eps, (normalized_shape,)
                self.weight = nn.Parameter(torch.ones(normalized_shape, dtype=params_dtype))
                self.bias = nn.Parameter(torch.zeros(normalized_shape, dtype=params_dtype))

            def forward(self, inp: Tensor) -> Tensor:
                return F.layer_norm(inp, self.shape, self.weight, self.bias, self.eps)

        class Linear(nn.Module):
            def __init__(self, in_features, out_features, *, bias=True, params_dtype=None, device="cuda") -> None:
                super().__init__()
                self.weight = nn.Parameter(torch.zeros(out_features, in_features, dtype=params_dtype))
                self.bias = nn.Parameter(torch.zeros(out_features, dtype=params_dtype))

            def forward(self, inp: Tensor) -> Tensor:
                return F.linear(inp, self.weight, self.bias)

        class WithNorm(nn.Module):
            def __init__(self, hidden_size, eps, dtype) -> None:
                super().__init__()
                self.eps = eps
                self.layer_norm_weight = nn.Parameter(torch.ones(hidden_size, dtype=dtype))
                self.layer_norm_bias = nn.Parameter(torch.zeros(hidden_size, dtype=dtype))

            def normed(self, inp: Tensor) -> Tensor:
                return F.layer_norm(inp, inp.shape[-1:], self.layer_norm_weight, self.layer_norm_bias, self.eps)

        class LayerNormLinear(WithNorm):
            def __init__(self, in_features, out_features, eps=1e-5, *, params_dtype=None, device="cuda") -> None:
                super().__init__(in_features, eps, params_dtype)
                self.weight = nn.Parameter(torch.zeros(out_features, in_features, dtype=params_dtype))
                self.bias = nn.Parameter(torch.zeros(out_features, dtype=params_dtype))

            def forward(self, inp: Tensor) -> Tensor:
                return F.linear(self.normed(inp), self.weight, self.bias)

        class LayerNormMLP(WithNorm):
            def __init__(
                self, hidden_size, ffn_hidden_size, eps=1e-5, *, activation="gelu", params_dtype=None, device="cuda"
            ) -> None:
                super().__init__(hidden_size, eps, params_dtype)
                assert activation == "gelu"
                self.fc1_weight = nn.Parameter(torch.zeros(ffn_hidden_size, hidden_size, dtype=params_dtype))
                self.fc1_bias = nn.Parameter(torch.zeros(ffn_hidden_size, dtype=params_dtype))
                self.fc2_weight = nn.Parameter(torch.zeros(hidden_size, ffn_hidden_size, dtype=params_dtype))
                self.fc2_bias = nn.Parameter(torch.zeros(hidden_size, dtype=params_dtype))

            def forward(self, inp: Tensor) -> Tensor:
                hidden = F.gelu(F.linear(self.normed(inp), self.fc1_weight, self.fc1_bias))
                return F.linear(hidden, self.fc2_weight, self.fc2_bias)

        class DotProductAttention(nn.Module):
            def __init__(self, num_attention_heads, kv_channels, *, qkv_format="sbhd", attn_mask_type="causal") -> None:
                super().__init__()
                assert (qkv_format, attn_mask_type) == ("bshd", "no_mask")
                self.shape = (num_attention_heads, kv_channels)

            def forward(self, query_layer: Tensor, key_layer: Tensor, value_layer: Tensor) -> Tensor:
                assert query_layer.shape[2:] == self.shape
                watch(query_layer, key_layer, value_layer)
                return softmax_attention(query_layer, key_layer, value_layer).flatten(2)

        self.LayerNorm, self.Linear, self.LayerNormLinear = Norm, Linear, LayerNormLinear
        self.LayerNormMLP, self.DotProductAttention = LayerNormMLP, DotProductAttention


def quack_layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None = None, eps: float = 1e-6) -> Tensor:
    assert x.ndim == 2 and weight.dtype == bias.dtype == torch.float32
    return F.layer_norm(x.float(), weight.shape, weight, bias, eps).to(x.dtype)


def apex_layer_norm(input, weight, bias, normalized_shape, eps=1e-6, memory_efficient=False) -> Tensor:
    return F.layer_norm(input, normalized_shape, weight, bias, eps)


@pytest.fixture
def attended() -> list[tuple[Tensor, ...]]:
    """q, k and v of each call of an attention."""
    return []


@pytest.fixture
def libraries(monkeypatch: pytest.MonkeyPatch, attended: list) -> None:
    """Every library as a stand-in: the right mathematics behind the signature it documents."""

    def watch(*heads: Tensor) -> None:
        attended.append(heads)

    def attend(query, key, value, attn_bias=None, p=0.0, scale=None, *, op=None) -> Tensor:
        watch(query, key, value)
        return softmax_attention(query, key, value)

    def liger(X, W, B, eps) -> Tensor:
        return F.layer_norm(X, W.shape, W, B, eps)

    packed, with_lse = FlashAttention(watch, with_lse=False), FlashAttention(watch, with_lse=True)
    engine = TransformerEngine(watch)
    for name, contents in {
        "flash_attn": {"flash_attn_qkvpacked_func": packed.flash_attn_qkvpacked_func},
        "flash_attn_2_cuda": {},
        "flash_attn.cute": {"flash_attn_func": with_lse.flash_attn_func},
        "flash_attn_interface": {"flash_attn_qkvpacked_func": with_lse.flash_attn_qkvpacked_func},
        "xformers": {},
        "xformers.ops": {"memory_efficient_attention": attend, "unbind": torch.unbind},
        "liger_kernel": {},
        "liger_kernel.transformers": {},
        "liger_kernel.transformers.functional": {"liger_layer_norm": liger},
        "apex": {},
        "apex.normalization": {},
        "apex.normalization.fused_layer_norm": {"fused_layer_norm_affine": apex_layer_norm},
        "fused_layer_norm_cuda": {},
        "quack": {},
        "quack.rmsnorm": {"layernorm_fwd": quack_layer_norm},
        "transformer_engine": {},
        "transformer_engine.pytorch": vars(engine),
    }.items():
        module = types.ModuleType(name)
        module.__spec__, module.__path__ = importlib.machinery.ModuleSpec(name, None), []  # type: ignore[attr-defined]
        vars(module).update(contents)
        monkeypatch.setitem(sys.modules, name, module)
        parent, _, child = name.rpartition(".")
        if parent:
            setattr(sys.modules[parent], child, module)


def check(peer: op_peers.Peer, op: str, direction: str, dtype: str = "float32") -> None:
    """Two sets of tensors in turn: each must give what fp64 gives of it, and all of its gradients."""
    case = tiny(op, direction, dtype=dtype)
    call, function = op_calls.call(case), peer.build(case)
    wanted = () if direction == "forward" else call.wanted
    for seed in (0, 1, 0):
        given = op_calls.tensors(case, CPU, seed)
        dy = op_calls.upstream(call.eager(**given)) if wanted else None
        exact, eager = op_calls.exact(case, given, dy), op_suite.results(call.eager, given, wanted, dy)
        with peer.scope():
            got = op_suite.results(function, given, wanted, dy)
        for name, result, want, yardstick in zip(("output", *wanted), got, exact, eager, strict=True):
            assert result.shape == want.shape
            assert tolerances.compare(result, want, yardstick, gradient=name != "output") is None, name


LIBRARIES = [(peer.name, op) for peer in op_peers.PEERS if peer.modules for op in peer.ops]


@pytest.mark.parametrize("direction", ["forward", "forward+backward"])
@pytest.mark.parametrize(("name", "op"), LIBRARIES)
def test_an_adapter_gives_its_library_the_right_tensors(libraries, name: str, op: str, direction: str) -> None:
    peer = PEERS[name]
    if direction in peer.lacks:
        assert not peer.takes(tiny(op, direction))
        return
    assert peers.why_absent(peer.modules, peer.install) is None
    check(peer, op, direction)


@pytest.mark.parametrize("name", [name for name, op in LIBRARIES if op == "attention"])
def test_heads_are_views_of_the_packed_tensor(libraries, attended: list, name: str) -> None:
    case = tiny("attention", dtype="bfloat16")
    given = op_calls.tensors(case, CPU)
    PEERS[name].build(case)(**given)
    ((q, k, v),) = attended
    qkv, size = given["qkv"], given["qkv"].element_size()
    for place, heads in enumerate((q, k, v)):
        assert heads.data_ptr() == qkv.data_ptr() + place * case.width * size, "copied"
        assert heads.shape == (case.batch, case.tokens, case.heads, case.head_dim)
        assert heads.stride()[:2] == qkv.stride()[:2]


def test_quack_gets_weights_in_float32_converted_once(libraries, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr(
        sys.modules["quack.rmsnorm"], "layernorm_fwd", lambda *given: seen.append(given) or quack_layer_norm(*given)
    )
    case = tiny("layer_norm", dtype="bfloat16")
    function, given = PEERS["quack"].build(case), op_calls.tensors(case, CPU)
    for _ in range(2):
        function(**given)
    assert seen[0][1].data_ptr() == seen[1][1].data_ptr()
    check(PEERS["quack"], "layer_norm", "forward", "bfloat16")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("op", PEERS["onednn-packed"].ops)
def test_packed_products_are_right_and_packed_once(op: str, dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pack, packed = torch.ops.mkldnn._reorder_linear_weight, []
    monkeypatch.setattr(
        torch.ops.mkldnn, "_reorder_linear_weight", lambda weight, *rest: packed.append(weight) or pack(weight, *rest)
    )
    case = tiny(op, dtype=dtype)
    function, given = PEERS["onednn-packed"].build(case), op_calls.tensors(case, CPU)
    with torch.inference_mode():
        for _ in range(3):
            function(**given)
    matrices = [tensor for name, tensor in given.items() if name.endswith("weight") and tensor.ndim == 2]
    assert sorted(map(id, packed)) == sorted(map(id, matrices))
    check(PEERS["onednn-packed"], op, "forward", dtype)


@pytest.mark.filterwarnings("ignore:TypedStorage is deprecated")  # by what inductor itself calls
def test_weights_of_a_frozen_op_are_constants() -> None:
    case = tiny("linear_proj", batch=2, width=64)
    call, function = op_calls.call(case), FROZEN.build(case)
    given = op_calls.tensors(case, CPU)
    torch.compiler.reset()
    with torch.inference_mode():
        before, exact = function(**given), call.eager(**given)
        torch.testing.assert_close(before, exact)
        given["weight"].zero_()
        torch.testing.assert_close(function(**given), exact)
        given["x"].zero_()
        assert not torch.allclose(function(**given), exact), "x is no constant"
        other = op_calls.tensors(case, CPU, seed=1)
        torch.testing.assert_close(function(**other), call.eager(**other))
    torch.compiler.reset()


def test_a_peer_says_why_it_takes_no_part(libraries, monkeypatch: pytest.MonkeyPatch) -> None:
    cases = [tiny("attention", way, dtype=dtype) for way in ("forward", "backward") for dtype in ("float32", "float16")]
    cpu = op_peers.left_out(ALL, CPU, cases)
    assert cpu["flash-attn-2"] == "it needs a GPU"
    assert "onednn-packed" not in cpu and "apex" not in cpu, "they have no attention"
    gpu = op_peers.left_out(ALL, torch.device("cuda"), cases)
    assert {name for name in gpu if name.startswith("flash")} == {f"flash-attn-{n} (float32)" for n in (2, 3, 4)}
    assert "half precision" in gpu["flash-attn-2 (float32)"]
    assert not any("xformers" in name or "transformer-engine" in name for name in gpu)
    assert not any(name.startswith("compile") for name in gpu)
    assert [name for name in cpu if name.startswith("compile")] == ["compile-max-autotune (backward)"]
    monkeypatch.setitem(sys.modules, "flash_attn.cute", None)
    monkeypatch.delitem(sys.modules, "flash_attn.cute")
    monkeypatch.delitem(sys.modules, "xformers.ops")
    monkeypatch.delitem(sys.modules, "xformers")
    gone = op_peers.left_out(ALL, torch.device("cuda"), cases)
    assert gone["flash-attn-4"] == "flash_attn.cute is not installed:  pip install --pre flash-attn-4"
    assert gone["xformers"] == "xformers.ops is not installed:  pip install xformers"
    backward = op_peers.left_out(ALL, CPU, [tiny("linear_fc1", "backward")])
    assert set(backward) == {"compile-max-autotune (backward)", "onednn-packed (backward)"}


def fake(name: str, build: Callable[[object], Callable[..., Tensor]]) -> op_peers.Peer:
    return op_peers.Peer(name, ("layer_norm", "linear_qkv"), build)


def refuse(*given: object, **tensors: object) -> Tensor:
    raise RuntimeError("not today")


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_a_peer_that_breaks_is_left_out_and_a_wrong_one_is_noted(direction: str) -> None:
    case = tiny("layer_norm", direction)
    eager = op_calls.call(case).eager
    calls = [0]

    def later(**given: Tensor) -> Tensor:
        calls[0] += 1
        return eager(**given) if calls[0] < 2 else refuse()

    made = (
        fake("right", lambda case: eager),
        fake("wrong", lambda case: lambda **given: 1.5 * eager(**given)),
        fake("unbuilt", refuse),
        fake("broken", lambda case: refuse),
        fake("later", lambda case: later),
        op_peers.Peer("elsewhere", ("attention",), refuse),
        op_peers.Peer("needy", ("layer_norm",), refuse, device="cuda"),
        op_peers.Peer("halves", ("layer_norm",), refuse, lacks={"float32": "none"}),
        op_peers.Peer("one-way", ("layer_norm",), refuse, lacks={direction: "none"}),
    )
    measured = op_suite.run_case(case, op_suite.Options(CPU, (), made, repeats=2))
    found = {row["provider"]: row for row in measured.rows}
    assert list(found) == ["eager", "right", "wrong"]
    assert found["right"]["note"] == ""
    assert found["wrong"]["status"] == "ok" and found["wrong"]["ratio"] > 0 and found["wrong"]["median_ms"] > 0
    assert "max error" in found["wrong"]["note"]
    assert measured.left_out == dict.fromkeys(("unbuilt", "broken", "later"), "RuntimeError: not today")
    assert {row["level"] for row in measured.rows} == {rows.OP}


def test_the_suite_enters_a_peers_scope() -> None:
    from contextlib import contextmanager

    inside = [0]

    @contextmanager
    def scope():
        inside[0] += 1
        yield
        inside[0] -= 1

    case = tiny("linear_qkv")

    def function(**given: Tensor) -> Tensor:
        assert inside[0] == 1
        return op_calls.call(case).eager(**given)

    scoped = op_peers.Peer("scoped", ("linear_qkv",), lambda case: function, scope=scope)
    measured = op_suite.run_case(case, op_suite.Options(CPU, (), (scoped,), repeats=1))
    assert [row["provider"] for row in measured.rows] == ["eager", "scoped"]
