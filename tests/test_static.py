"""The static report: occupancy as NVIDIA's rules give it, the roofline, and that the kept table is of today's cases."""

import dataclasses
from collections import Counter

import pytest

from fastvit.benchmarks import aot, assembly, launches, static

ROW = aot.Row("op", "forward", "case", "bf16", "sm_90", 0, "_op_fwd_kernel", programs=1000, threads=256, registers=32)


@pytest.mark.parametrize(
    ("change", "blocks", "what"),
    [
        ({"threads": 256, "registers": 32}, 8, "threads"),
        ({"threads": 256, "registers": 64}, 4, "registers"),
        ({"threads": 256, "registers": 96}, 2, "registers"),  # 21 warps, 20 in quarters
        ({"threads": 128, "registers": 97}, 4, "registers"),  # as 104: 19 warps, 16 in quarters
        ({"threads": 128, "registers": 255}, 2, "registers"),
        ({"threads": 32, "registers": 16}, 32, "blocks"),
        ({"threads": 128, "registers": 32, "shared": 48 * 1024}, 4, "shared memory"),  # 4 x 49 KiB of 228
        ({"threads": 128, "registers": 32, "shared": 48 * 1024, "chip": "sm_80"}, 3, "shared memory"),
        ({"threads": 128, "registers": 32, "shared": 227 * 1024}, 1, "shared memory"),
    ],
)
def test_resident_blocks(change, blocks, what):
    assert static.resident_blocks(dataclasses.replace(ROW, **change)) == (blocks, what)


def test_no_occupancy_is_given_for_amd():
    assert static.resident_blocks(dataclasses.replace(ROW, chip="gfx942")) is None


def test_roofline():
    copy = static.Prediction(flops=0, bytes=4_300_000, dtype="bf16")
    assert (copy.microseconds, copy.roof) == (pytest.approx(1.0), "memory")
    product = static.Prediction(flops=790_000_000, bytes=1_000_000, dtype="fp16")
    assert (product.microseconds, product.roof, product.intensity) == (pytest.approx(1.0), "matrix", 790.0)
    exact = static.Prediction(flops=67_000_000, bytes=1_000_000, dtype="fp32")
    assert (exact.microseconds, exact.roof) == (pytest.approx(1.0), "multiply-add")


def test_a_call_of_two_kernels_is_predicted_once():
    case = launches.Launch(
        "op", "forward", "case", lambda dtype: (), flops=2_000_000, bytes=lambda itemsize: itemsize * 1000
    )
    rows = [ROW, dataclasses.replace(ROW, step=1, kernel="_op_sum_kernel", programs=1)]
    first, second, call = static.lines(rows, [case])
    assert [line["kernel"] for line in (first, second, call)] == ["_op_fwd_kernel", "_op_sum_kernel", "call"]
    assert (first["resident"], first["occupancy_pct"], first["waves"]) == ("8", "100", "0.95")
    assert (first["flops"], call["flops"], call["bytes"], call["roof"]) == ("", "2000000", "2000", "matrix")


@pytest.mark.parametrize(
    ("text", "width"),
    [
        ("ld.global.v4.b32 { %r1, %r2, %r3, %r4 }, [ %rd1 + 0 ];", "16"),
        ("ld.global.L1::evict_last.v2.b64 { %rd1, %rd2 }, [ %rd3 ];", "16"),
        ("@%p1 ld.global.b16 { %rs1 }, [ %rd1 + 0 ];", "2"),
        ("ld.global.v4.b32 {}, [ %rd1 ];\nld.global.b16 {}, [ %rd1 ];", "16"),
        ("cp.async.cg.shared.global [ %r1 + 0 ], [ %rd1 + 0 ], 0x10, %r2;", "16"),
        ("cp.async.ca.shared.global [ %r1 + 0 ], [ %rd1 + 0 ], 0x4, %r2;", "4"),
        ("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%r1], [%rd1], [%r4];", "TMA"),
        ("st.global.v4.b32 [ %rd1 + 0 ], { %r1, %r2, %r3, %r4 };", "0"),
        ("global_load_dwordx4 v[0:3], v[4:5], off", "16"),
        ("buffer_load_dword v1, v2, s[0:3], 0 offen", "4"),
        ("buffer_load_ushort v1, v2, s[0:3], 0 offen", "0"),
    ],
)  # fmt: skip
def test_widest_load(text, width):
    assert assembly.widest_load(text) == width


PIPELINED = """
%d = ttg.local_alloc : () -> !ttg.memdesc<{d}x64x128xbf16, #shared, #smem, mutable>
%x = ttg.local_alloc : () -> !ttg.memdesc<3x64x128xbf16, #shared, #smem, mutable>
%d_1 = ttg.memdesc_index %d[%i] : !ttg.memdesc<{d}x64x128xbf16, #shared, #smem, mutable>
%x_1 = ttg.memdesc_index %x[%i] : !ttg.memdesc<3x64x128xbf16, #shared, #smem, mutable>
%d_2 = ttg.memdesc_trans %d_1 {{order = array<i32: 1, 0>}} : !ttg.memdesc<64x128xbf16, #shared, #smem, mutable>
%y = ttng.warp_group_dot %d_2, %x_1, %sums {{inputPrecision = 0 : i32, isAsync = true}} : ...
%y_1:3 = ttng.warp_group_dot_wait %y, %d_2, %x_1 {{pendings = {waits} : i32}} : ...
"""


@pytest.mark.parametrize(
    ("depth", "waits", "more", "buffers"),
    [
        (3, 1, "", ""),
        (3, 1, "%r = ttg.local_load %d_1 : ...", "%d"),
        (2, 1, "", "%d"),
        (2, 0, "%r = ttg.local_load %d_1 : ...", ""),
    ],
)
def test_operands_that_a_copy_overwrites(depth, waits, more, buffers):
    assert assembly.overwritten_operands(PIPELINED.format(d=depth, waits=waits) + more) == buffers


def test_a_sample_of_the_compilations_leaves_no_case_and_no_chip_out():
    cases = [launches.Launch("op", "forward", str(n), lambda dtype: (), None if n % 3 else 1) for n in range(30)]
    sampled = list(aot.plan(cases, full=False))
    assert len(list(aot.plan(cases, full=True))) == 30 * 12
    in_turn = Counter((dtype, chip) for _, dtype, chip in sampled if (dtype, chip) not in aot.ALWAYS)
    assert len(sampled) == 30 + in_turn.total()
    assert set(in_turn.values()) == {2}  # each as often as the other, however many cases there are
    few = Counter((dtype, chip) for _, dtype, chip in aot.plan(cases[:6], full=False))
    assert few.total() == 4 * 2 + 2 * 3
    assert {case.label for case, _, _ in sampled} == {case.label for case in cases}
    every = {(dtype, chip) for dtype in ("fp32", "bf16") for chip in aot.CHIPS} | {("fp16", "sm_90")}
    assert {(dtype, chip) for _, dtype, chip in sampled} == every


def test_the_kept_report_is_of_todays_cases():
    kept = {tuple(line[name] for name in ("op", "entry", "case", "dtype", "chip")) for line in static.read_csv()}
    wanted = {
        (case.op, case.entry, case.label, dtype, chip)
        for case, dtype, chip in aot.plan(list(launches.launches()), full=True)
        if case.flops is not None
    }
    assert kept == wanted, "run `make static`"
    assert (static.RESULTS / "static.md").exists()
