"""What only the native layer has: instruction sets, tails, its own exp and erf, threads, strides, build information."""

import importlib
import math
import os
import platform
import re
import subprocess
import sys
from dataclasses import FrozenInstanceError

import memory
import pytest
import torch
import torch.nn.functional as F
from tolerances import assert_close
from torch import Tensor

from fastvit import native, native_cuda
from fastvit.ops._attention_arguments import PLAIN

pytestmark = pytest.mark.skipif(native.why_unavailable("cpu") is not None, reason=str(native.why_unavailable("cpu")))

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
ACTIVATIONS = {
    "none": lambda x: x,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
}


def linear(x: Tensor, weight: Tensor, *, bias=None, scale=None, residual=None, activation="none", keep=False):
    return native.cpu.linear.forward(x, weight, bias, scale, residual, activation, keep, None)


def arguments(op: str, dtype: torch.dtype, rows: int = 45) -> tuple:
    """One set of launcher arguments per op, with sizes that leave tails everywhere."""
    r = lambda *shape: torch.randn(*shape, dtype=dtype)  # noqa: E731
    if op == "layer_norm":
        return r(rows, 83), r(rows, 83), r(83), r(83), r(83), 1e-6, None
    if op == "group_norm":
        return r(rows // 9, 6, 83), 3, r(6), r(6), 1e-5, True
    if op == "attention":
        q, k, v = r(2, rows, 3, 3, 19).permute(2, 0, 3, 1, 4).unbind(0)
        return q, k, v, torch.rand(2, 1, 1, rows).expand(2, 3, rows, rows) > 0.2, False, 0.23, *PLAIN
    if op == "linear":
        return r(rows, 67), r(71, 67), r(71), r(71), r(rows, 71), "gelu", True, None
    if op == "norm_mlp":
        parameters = r(53), r(53), r(101, 53) / 7, r(101), r(53, 101) / 10, r(53), r(53)
        return r(rows, 53), *parameters, 1e-6, "gelu", True, True, None
    image = torch.randint(0, 256, (rows // 9, 3, 15, 15), dtype=torch.uint8)
    return image, r(37, 3, 5, 5), r(37), r(11, 37), r(2, 37), torch.rand(3) / 99, torch.randn(3)


OPS = ("layer_norm", "group_norm", "attention", "linear", "norm_mlp", "patch_embed")


def outputs(op: str, args: tuple) -> tuple[Tensor, ...]:
    result = getattr(native.cpu, op).forward(*args)
    return result if isinstance(result, tuple) else (result,)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("m", "n", "k"), [(1, 1, 1), (3, 17, 1), (5, 33, 31), (15, 32, 64), (29, 5, 513), (197, 65, 48), (7, 9, 0)]
)
def test_products_of_every_tail(isa, dtype, m, n, k):
    x, weight = torch.randn(m, k, dtype=dtype), torch.randn(n, k, dtype=dtype)
    bias, scale, residual = torch.randn(n, dtype=dtype), torch.randn(n, dtype=dtype), torch.randn(m, n, dtype=dtype)
    y, preact = linear(x, weight, bias=bias, scale=scale, residual=residual, activation="gelu", keep=True)
    exact = F.linear(x.double(), weight.double(), bias.double())
    eager = F.linear(x, weight, bias)
    assert_close("preact", preact, exact, eager)
    assert_close("y", y, residual.double() + scale.double() * F.gelu(exact), residual + scale * F.gelu(eager))


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_instruction_sets_agree(isa, op, dtype):
    args = arguments(op, dtype)
    mine = outputs(op, args)
    torch.ops.fastvit_native.cpu_isa("portable")
    bound = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 0.1, torch.float16: 0.02}[dtype]
    for one, other in zip(mine, outputs(op, args), strict=True):
        torch.testing.assert_close(one, other, rtol=bound, atol=bound)


def relative_error(x: Tensor, activation: str, exact: Tensor) -> Tensor:
    y, _ = linear(x[:, None], torch.ones(1, 1), activation=activation)
    return ((y[:, 0].double() - exact) / exact).abs()


def test_gelu_is_right_to_fp32_rounding_in_the_tail_too(isa):
    x = torch.cat([torch.linspace(-12.5, 12.5, 100_001), torch.logspace(-30, 0, 1001), -torch.logspace(-30, 0, 1001)])
    x = x[x != 0]
    exact = 0.5 * x.double() * torch.special.erfc(-x.double() / math.sqrt(2))
    error = relative_error(x, "gelu", exact)
    fused = isa != "portable"  # without a fused multiply-add, x^2 is rounded before it enters the exponential
    assert error[x > -4].max() < (4e-7 if fused else 1e-6)
    assert error[(x >= -6) & (x <= -4)].max() < (6e-7 if fused else 2e-6)
    assert error.max() < (6e-7 if fused else 1e-5)


@pytest.mark.parametrize("activation", ["gelu_tanh", "quick_gelu"])
def test_sigmoid_gelus_keep_their_relative_error(isa, activation):
    x = torch.linspace(-8, 8, 50_001)
    x = x[x != 0]
    v = x.double()
    argument = 1.702 * v if activation == "quick_gelu" else 2 * math.sqrt(2 / math.pi) * (v + 0.044715 * v**3)
    # An argument of 40 rounded to fp32 moves the exponential by 40 ulp / 2: no fp32 formula is better than that.
    assert (relative_error(x, activation, v * torch.sigmoid(argument)) / (1 + argument.abs())).max() < 3e-7


@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh", "quick_gelu"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_activations_far_out(isa, activation, dtype):
    x = torch.tensor([1e4, -1e4, 30.0, -30.0, math.inf, -math.inf, math.nan, 0.0], dtype=dtype)
    y, _ = linear(x[:, None], torch.ones(1, 1, dtype=dtype), activation=activation)
    exact = ACTIVATIONS[activation](x.double()).to(dtype)
    rtol = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 0.01, torch.float16: 0.002}[dtype]
    torch.testing.assert_close(y.flatten(), exact, rtol=rtol, atol=1e-30, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_hidden_gelu_far_out(isa, dtype):
    bias = torch.tensor([-1e4, -300.0, -6.0, -4.5, -4.0, -1.0, 0.0, 0.01, 1.0, 4.0, 6.0, 1e4]).to(dtype)
    x, n = torch.randn(3, 12).to(dtype), len(bias)
    parameters = (None, None, torch.zeros(n, n).to(dtype), bias, torch.eye(n).to(dtype), None, None)
    y, *_ = native.cpu.norm_mlp.forward(x, *parameters, 1e-6, "gelu", False, False, None)
    exact = F.gelu(bias.double()).expand(3, n)
    torch.testing.assert_close(y.double(), exact, atol=4e-5 if dtype == torch.bfloat16 else 1e-6, rtol=0.004)
    bias[3] = math.nan
    y, *_ = native.cpu.norm_mlp.forward(x, *parameters, 1e-6, "gelu", False, False, None)
    assert y.isnan().all()


def test_exp_through_two_keys(isa):
    t = torch.linspace(0, 100, 20_001)
    q, k, v = (
        t[None, None, :, None],
        torch.tensor([0.0, -1.0])[None, None, :, None],
        torch.tensor([0.0, 1.0])[None, None, :, None],
    )
    out, lse = native.cpu.attention.forward(q, k, v, None, False, 1.0, *PLAIN)
    exact = torch.exp(-t.double()) / (1 + torch.exp(-t.double()))
    normal = exact > 1.2e-38
    assert ((out.flatten().double() - exact) / exact)[normal].abs().max() < 4e-7
    assert (out.flatten().double() - exact)[~normal].abs().max() < 1e-43
    assert (lse.flatten().double() - torch.log1p(torch.exp(-t.double()))).abs().max() < 2e-7


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_every_16_bit_number_converts_both_ways(isa, dtype):
    x = torch.arange(-32768, 32768, dtype=torch.int32).to(torch.int16).view(dtype)
    if dtype == torch.bfloat16:
        x = x[~(x.abs().float() < 2e-38)]  # the bf16 dot product flushes denormals
    for factor in (1.0, 1.37, -0.0023, 3000.0):
        weight = torch.full((1, 1), factor, dtype=dtype)
        expected = (x.float() * weight.float()).to(dtype).flatten()
        if dtype == torch.bfloat16:
            keep = ~(expected.abs().float() < 2e-38)
        else:
            keep = torch.ones_like(expected, dtype=torch.bool)
        y = linear(x[:, None], weight)[0].flatten()
        assert torch.equal(y[keep].nan_to_num(0.5), expected[keep].nan_to_num(0.5))


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bits_do_not_depend_on_the_number_of_threads(isa, op, dtype, threads):
    args = arguments(op, dtype, rows=90)
    threads(1)
    one = outputs(op, args)
    for count in (2, 3, 7):
        threads(count)
        for a, b in zip(one, outputs(op, args), strict=True):
            assert torch.equal(a, b), count


def test_what_make_memcheck_runs(threads):
    threads(2)
    memory.check_all()


@pytest.mark.parametrize("op", ["linear", "norm_mlp"])
def test_many_rows_are_shared_out_by_rows_with_the_same_bits(op, threads):
    args = arguments(op, torch.float32, rows=1000)
    threads(1)
    one = outputs(op, args)
    threads(2)
    assert all(torch.equal(a, b) for a, b in zip(one, outputs(op, args), strict=True))


@pytest.mark.parametrize("op", OPS)
def test_views_give_the_same_bits(isa, op):
    args = arguments(op, torch.float32)

    def in_arena(t):
        """The same values in rows far apart and misaligned, with NaN everywhere else."""
        if not isinstance(t, Tensor) or not t.is_floating_point() or t.dim() not in (1, 2):
            return t
        if t.dim() == 1:
            arena = torch.full((t.numel() + 14,), math.nan)
            arena[7:-7] = t
            return arena[7:-7]
        arena = torch.full((2 * t.shape[0] + 2, t.shape[1] + 8), math.nan)
        view = arena[1:-1:2, 3:-5]
        return view.copy_(t)

    expected = outputs(op, args)
    for a, b in zip(expected, outputs(op, tuple(map(in_arena, args))), strict=True):
        assert torch.equal(a, b)


def test_rows_and_heads_of_stride_zero(isa):
    x, weight = torch.randn(1, 33).expand(20, 33), torch.randn(21, 33)
    assert torch.equal(linear(x, weight)[0], linear(x.contiguous(), weight)[0])
    y = native.cpu.layer_norm.forward(x, None, None, None, None, 1e-6, None)[0]
    assert torch.equal(y, native.cpu.layer_norm.forward(x.contiguous(), None, None, None, None, 1e-6, None)[0])
    q = torch.randn(1, 1, 1, 24).expand(2, 3, 40, 24)
    mask = torch.randn(1, 1, 40, 1).expand(2, 3, 40, 40)
    got = native.cpu.attention.forward(q, q, q, mask, True, 0.2, *PLAIN)
    want = native.cpu.attention.forward(*[q.contiguous()] * 3, mask.contiguous(), True, 0.2, *PLAIN)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "crop", "mirrored_strides"])
def test_images_of_any_layout(isa, layout):
    image, weight = torch.randn(2, 3, 12, 18), torch.randn(11, 3, 4, 6)
    view = {
        "contiguous": lambda t: t,
        "channels_last": lambda t: t.contiguous(memory_format=torch.channels_last),
        "crop": lambda t: F.pad(t, (5, 3, 1, 2), value=math.nan)[..., 1:-2, 5:-3],
        "mirrored_strides": lambda t: t.transpose(-1, -2).contiguous().transpose(-1, -2),
    }[layout](image)
    forward = native.cpu.patch_embed.forward
    y = forward(view, weight, None, None, None, None, None)
    assert torch.equal(y, forward(image.clone(), weight, None, None, None, None, None))
    assert_close(
        "tokens",
        y,
        *(F.conv2d(t(image), t(weight), stride=(4, 6)).flatten(2).mT for t in (Tensor.double, Tensor.float)),
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_a_mask_hides_stays_hidden(isa, dtype):
    q, k, v = (torch.randn(2, 3, 40, 20, dtype=dtype) for _ in range(3))
    mask = torch.rand(2, 3, 40, 40) > 0.3
    mask[..., 7] = False
    mask[1, 2, 5] = False
    clean = native.cpu.attention.forward(q, k, v, mask, False, 0.2, *PLAIN)
    k[:, :, 7] = math.nan
    v[:, :, 7] = math.inf
    out, lse = native.cpu.attention.forward(q, k, v, mask, False, 0.2, *PLAIN)
    assert torch.equal(lse, clean[1])
    torch.testing.assert_close(out, clean[0], rtol=0.02, atol=0.02)
    assert (out[1, 5, 2] == 0).all()
    assert lse[1, 2, 5] == -math.inf
    causal, _ = native.cpu.attention.forward(q, k, v, None, True, 0.2, *PLAIN)
    assert torch.equal(causal.isnan().any(-1)[0, :, 0], torch.arange(40) >= 7)


def test_values_of_one_show_leaked_padding(isa):
    for n in (*range(1, 50), 197):
        q, k = torch.ones(1, 2, n, 59), -1.0 - 0.1 * torch.rand(1, 2, n, 59)
        out, _ = native.cpu.attention.forward(q, k, torch.ones(1, 2, n, 59), None, False, 20 / 59, *PLAIN)
        assert (out - 1).abs().max() < 1e-5, n


def test_rows_far_from_zero_keep_their_variance(isa):
    for row in (torch.full((1, 65), 1e4), torch.arange(40000.0, 40004.0)[None], torch.randn(3, 1023) + 1e4):
        y, _, mean, rstd = native.cpu.layer_norm.forward(row, None, None, None, None, 1e-12, None)
        exact = F.layer_norm(row.double(), row.shape[1:], eps=1e-12)
        assert (y.double() - exact).abs().max() < 1e-4 * exact.abs().max().clamp(min=1)
        assert torch.equal(mean, row.double().mean(1).float())
        assert not rstd.isnan().any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("op", OPS)
def test_no_rows_are_fine(isa, op, dtype):
    empty, full = outputs(op, arguments(op, dtype, rows=0)), outputs(op, arguments(op, dtype, rows=9))
    for a, b in zip(empty, full, strict=True):
        assert a.numel() == 0
        assert a.dtype == b.dtype
        assert a.dim() == b.dim()


def test_no_keys_give_zeros(isa):
    q, none = torch.randn(1, 2, 5, 8), torch.randn(1, 2, 0, 8)
    out, lse = native.cpu.attention.forward(q, none, none, None, False, 1.0, *PLAIN)
    assert out.shape == (1, 5, 2, 8)
    assert (out == 0).all()
    assert (lse == -math.inf).all()


@pytest.mark.parametrize(
    ("op", "position", "bad"),
    [
        ("linear", 1, torch.randn(71, 66)),
        ("linear", 1, torch.randn(71, 67, dtype=torch.float64)),
        ("linear", 2, torch.randn(70)),
        ("linear", 5, "relu"),
        ("layer_norm", 1, torch.randn(44, 83)),
        ("layer_norm", 0, torch.randn(83, 45).mT),
        ("attention", 1, torch.randn(2, 3, 45, 18)),
        ("attention", 3, torch.zeros(2, 3, 45, 44)),
        ("norm_mlp", 5, torch.randn(53, 100)),
        ("patch_embed", 0, torch.zeros(5, 3, 14, 15, dtype=torch.uint8)),
        ("patch_embed", 5, None),
    ],
)
def test_a_direct_call_cannot_leave_its_tensors(op, position, bad):
    args = list(arguments(op, torch.float32))
    args[position] = bad
    with pytest.raises(RuntimeError, match=op):
        outputs(op, tuple(args))


def test_build_information():
    info = native.build_info()
    assert info["torch_target"] == (2, 10)
    assert info["cpu_detected"] in info["cpu_compiled"]
    assert set(info) >= {"version", "compiler", "cpu_active", "cuda_architectures"}


def in_fresh_interpreter(code: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **environment}, capture_output=True, text=True, timeout=300
    )


def test_the_peak_is_a_rate(isa):
    rates = {
        compute: torch.ops.fastvit_native.cpu_peak(compute) for compute in ("float32", "bfloat16", "float64", "int8")
    }
    assert all(math.isfinite(rate) and rate > 0.1 for rate in rates.values()), rates
    with pytest.raises(RuntimeError, match="compute must be"):
        torch.ops.fastvit_native.cpu_peak("int4")


def test_environment_chooses_the_instruction_set():
    code = "from fastvit import native; print(native.build_info()['cpu_active'])"
    assert in_fresh_interpreter(code, FASTVIT_CPU="portable").stdout.strip() == "portable"
    code = "from fastvit import native; print(native.why_unavailable('cpu'))"
    assert "got sse9" in in_fresh_interpreter(code, FASTVIT_CPU="sse9").stdout


@pytest.mark.skipif(platform.machine() != "x86_64", reason="what other CPUs have is compiled for all of them")
def test_no_instruction_strays_from_its_instruction_set():
    """What a CPU without AVX runs, from the import to the choice of kernels, are functions outside their namespaces."""
    command = ["objdump", "--disassemble", "--no-show-raw-insn", importlib.import_module("fastvit._C").__file__]
    levels = {"portable": 0, "avx2": 1, "avx512": 2}
    owner = re.compile(rf"7fastvit\d+({'|'.join(levels)})")
    used = re.compile(r"\t(.*%(?:zmm|k[0-7]|[xy]mm(?:1[6-9]|[23]\d)))|\t(?:{vex} )?v")
    strays, most, name, allowed = {}, [0, 0, 0], "", 0
    for line in subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines():
        if line.endswith(">:"):
            name, found = line.split()[1], owner.search(line)
            allowed = levels[found[1]] if found else 0
        elif match := used.search(line):
            level = 2 if match[1] else 1
            most[allowed] = max(most[allowed], level)
            if level > allowed:
                strays.setdefault(name, line)
    assert not strays, f"{len(strays)} functions: {list(strays.items())[:3]}"
    assert most == [0, 1, 2], "the kernels' names are not known"


def test_importing_the_module_loads_nothing():
    code = "import sys; from fastvit import native; print('fastvit._C' in sys.modules)"
    assert in_fresh_interpreter(code).stdout.strip() == "False"


def test_launchers_say_what_they_refuse():
    args = arguments("linear", torch.float32)
    assert native.cpu.linear.why_not(*args) is None
    assert "computes in" in native.cpu.linear.why_not(
        *arguments("linear", torch.float32)[:0], args[0].long(), *args[1:]
    )
    assert "meta" in native.cpu.linear.why_not(args[0].to("meta"), *args[1:])
    assert "cuda" in native_cuda.cuda.layer_norm.why_not(*arguments("layer_norm", torch.float32))
    with pytest.raises(FrozenInstanceError):
        native.cpu.linear.op = "other"


def test_asking_is_traceable():
    @torch.compile(fullgraph=True, backend="eager")
    def double_if_native(x, weight):
        return x * 2 if native.cpu.linear.why_not(x, weight, None, None, None, "none", False, None) is None else x

    assert torch.equal(double_if_native(torch.ones(2, 3), torch.ones(4, 3)), torch.full((2, 3), 2.0))
