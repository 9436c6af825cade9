"""The benchmark suite: closed formulas against oracles, rows, timing, the parity rule, photographs."""

import itertools
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import fastvit
from fastvit.benchmarks import accuracy, cases, measure, peers, rows, suite, table

# arXiv 2010.11929's models with 1000 classes, attention products included
GMACS = {
    "vit_tiny_patch16_224": "1.254",
    "vit_small_patch16_224": "4.599",
    "vit_base_patch32_224": "4.409",
    "vit_base_patch16_224": "17.564",
    "vit_base_patch16_384": "55.484",
    "vit_large_patch16_224": "61.555",
    "vit_large_patch32_224": "15.378",
    "vit_huge_patch14_224": "167.295",
}


@pytest.mark.parametrize("name", GMACS)
def test_multiply_adds_are_the_published_ones(name: str) -> None:
    assert f"{cases.macs(fastvit.PRESETS[name]) / 1e9:.3f}" == GMACS[name]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"reg_tokens": 4, "init_values": 0.1},
        {"class_token": False, "global_pool": "avg", "num_classes": 10},
        {"global_pool": "", "num_classes": 7},
        {"img_size": (48, 64), "patch_size": 8, "in_chans": 1, "mlp_ratio": 2.5},
        {"representation_size": 96},
    ],
)
def test_flops_are_what_torch_counts(options: dict) -> None:
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    options = {"img_size": 64, "embed_dim": 48, "depth": 2, "num_heads": 3, **options}
    model = fastvit.VisionTransformer(**options).eval()
    config = fastvit.ViTConfig(**options)
    height, width = cases.pair(config.img_size)
    image = torch.rand(2, config.in_chans, height, width)
    math_only = sdpa_kernel(SDPBackend.MATH)  # its products are counted, those inside a fused attention are not
    with fastvit.backend("reference"), math_only, torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(image)
    assert cases.flops(config, 2) == counter.get_total_flops()


def test_traffic_grows_by_the_batch_and_counts_weights_once() -> None:
    config = fastvit.PRESETS["vit_base_patch16_224"]
    one, two, three = (cases.traffic(config, batch, torch.float32) for batch in (1, 2, 3))
    assert three - two == two - one
    weights = sum(p.numel() for p in fastvit.create_model("vit_base_patch16_224").parameters() if p.ndim > 1)
    assert (2 * one - two) / 4 == pytest.approx(weights, rel=0.001)
    assert cases.traffic(config, 3, torch.bfloat16) * 2 == three


def row(provider: str = "eager", batch: int = 1, **columns: object) -> dict:
    base = {"case": "vit", "shape": f"{batch}x3x8x8", "dtype": "float32", "direction": "forward", "device": "cpu"}
    shown = {"status": "ok", "median_ms": 2.0, "p20_ms": 1.5, "p80_ms": 2.5, "images_per_s": 500.0, "ratio": 1.0}
    stamp = {"eager": "timm", "torch": "2", "fastvit": "0", "commit": "unknown", "date": "2026-01-01", "images": "two"}
    return {**base, **shown, **stamp, "provider": provider, **columns}


def test_rows_are_appended_and_replaced_by_key(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "rows.csv"
    assert rows.read(path) == []
    assert rows.write(path, [row(), row("fastvit")]) == 2
    assert rows.write(path, [row("fastvit", median_ms=1 / 3), row("fastvit", batch=8)]) == 3
    got = rows.read(path)
    assert [rows.key(r) for r in got] == [rows.key(r) for r in (row(), row("fastvit"), row("fastvit", batch=8))]
    assert [r["median_ms"] for r in got] == ["2", "0.333333", "2"]
    assert list(tmp_path.joinpath("deep").iterdir()) == [path]


def test_every_key_column_tells_rows_apart(tmp_path: Path) -> None:
    variants = [row(), *(row(**{"provider": "eager", column: "other"}) for column in rows.KEY if column != "provider")]
    assert rows.write(tmp_path / "rows.csv", [*variants, row("fastvit")]) == len(rows.KEY) + 1


def test_an_interrupted_write_leaves_the_old_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "rows.csv"
    rows.write(path, [row()])
    before = path.read_bytes()

    class Interrupted(BaseException):
        pass

    def interrupt(*_: object) -> None:
        raise Interrupted

    for name in ("os.fsync", "os.replace"):
        with monkeypatch.context() as patch:
            patch.setattr(name, interrupt)
            with pytest.raises(Interrupted):
                rows.write(path, [row("fastvit")])
        assert path.read_bytes() == before
        assert list(tmp_path.iterdir()) == [path]


def test_unknown_columns_survive_and_foreign_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    rows.write(path, [row(watts="300")])
    rows.write(path, [row("fastvit")])
    assert [r["watts"] for r in rows.read(path)] == ["300", ""]
    for content in (b"a,b\n1,2\n", b"\xff\xfe\x00", ",".join(rows.KEY).encode() + b"\n1,2\n"):
        path.write_bytes(content)
        with pytest.raises(rows.RowError, match=r"rows\.csv"):
            rows.write(path, [row()])
        assert path.read_bytes() == content
    path.write_text("")
    assert rows.write(path, [row()]) == 1


def test_quantiles_are_numpys() -> None:
    samples = list(np.random.default_rng(0).random(11))
    for count, share in itertools.product((1, 2, 5, 10, 11), (0.2, 0.5, 0.8)):
        assert measure.quantile(samples[:count], share) == pytest.approx(np.quantile(samples[:count], share))
    with pytest.raises(ValueError, match="no samples"):
        measure.quantile([], 0.5)


def test_rounds_are_interleaved_and_warm_up_is_dropped() -> None:
    calls, entered, now = [], [], [0.0]
    costs = {"a": 1.0, "b": 2.0, "c": 4.0}

    class Scope:
        def __init__(self, name: str) -> None:
            self.name = name

        def __enter__(self) -> None:
            entered.append(self.name)

        def __exit__(self, *_: object) -> None:
            entered.remove(self.name)

    def provider(name: str) -> measure.Provider:
        def run() -> torch.Tensor:
            assert entered == [name]
            calls.append(name)
            now[0] += costs[name] + (100 if len(calls) <= 6 else 0)
            return torch.empty(0)

        return measure.Provider(name, run, lambda: Scope(name))

    def clock(call) -> float:
        before = now[0]
        call()
        return now[0] - before

    told: list[tuple[int, int]] = []
    timings = measure.interleave(
        [provider(name) for name in costs], clock, repeats=6, warmup=2, on_round=lambda *done: told.append(done)
    )
    assert {name: timing.samples for name, timing in timings.items()} == {n: [c] * 6 for n, c in costs.items()}
    assert told == [(done, 8) for done in range(1, 9)]
    rounds = [tuple(calls[start : start + 3]) for start in range(6, len(calls), 3)]
    assert all(sorted(turn) == ["a", "b", "c"] for turn in rounds)
    assert len(set(rounds)) == 6  # every order of three, so every place and every neighbour
    assert {name: sum(turn[0] == name for turn in rounds) for name in costs} == {"a": 2, "b": 2, "c": 2}


@pytest.mark.parametrize(("seconds", "rounds"), [(1e-4, measure.MAX_ROUNDS), (1.0, 20), (60.0, measure.MIN_ROUNDS)])
def test_open_repeats_fit_the_budget(seconds: float, rounds: int) -> None:
    provider = measure.Provider("a", lambda: torch.empty(0))
    assert len(measure.interleave([provider], lambda call: seconds)["a"].samples) == rounds


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="GPU: this system keeps no high-water mark")
def test_peak_memory_sees_what_a_call_held() -> None:
    def hold(mib: int) -> measure.Provider:
        return measure.Provider("a", lambda: torch.ones(mib * 2**18).sum())

    for mib in (300, 40):
        assert measure.peak_mib(hold(mib), torch.device("cpu")) == pytest.approx(mib, abs=12)


def test_the_parity_rule() -> None:
    exact = torch.randn(4, 10, dtype=torch.float64)

    def off_by(error: float) -> accuracy.Accuracy:
        wrong = exact.clone()
        wrong[2, 3] += error
        return accuracy.compare(wrong, exact)

    eager = off_by(1e-3)
    for dtype, factor in ((torch.float32, 4), (torch.bfloat16, 2), (torch.float16, 2)):
        assert accuracy.why_red(dtype, off_by(0.99 * factor * 1e-3), eager, 1.0) is None
        assert "above the bound" in str(accuracy.why_red(dtype, off_by(1.1 * factor * 1e-3), eager, 1.0))
        for bad in (float("nan"), float("inf")):
            assert "NaN or infinity" in str(accuracy.why_red(dtype, off_by(bad), eager, 1.0))
            assert "eager itself" in str(accuracy.why_red(dtype, eager, off_by(bad), 1.0))
    assert accuracy.compare(exact.flip(0), exact).top1 < 1 == accuracy.compare(exact, exact).top1
    with pytest.raises(ValueError, match="shape"):
        accuracy.compare(exact[:2], exact)


def test_random_weights_are_seeded_and_never_degenerate() -> None:
    options = {"img_size": 32, "embed_dim": 24, "depth": 1, "num_heads": 2, "init_values": 1e-5, "reg_tokens": 2}
    one, two, other = (peers.randomise_(fastvit.VisionTransformer(**options), seed) for seed in (0, 0, 1))
    for (name, a), b, c in zip(one.named_parameters(), two.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b), name
        assert not torch.equal(a, c), name
        assert a.std() > 0.01, name


def test_timed_copies_share_their_weights() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.BatchNorm1d(3))
    twin = suite._twin(model)
    assert twin[0] is not model[0]
    for (name, a), b in zip(
        model.state_dict(keep_vars=True).items(), twin.state_dict(keep_vars=True).values(), strict=True
    ):
        assert a is b, name


def test_importing_the_peers_loads_none_of_them() -> None:
    code = (
        "import sys, fastvit.benchmarks.peers; print({'timm', 'torchvision', 'sklearn', 'matplotlib'} & {*sys.modules})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.strip() == "set()"


def test_torchvision_is_repaired_once_and_timm_imports() -> None:
    assert peers.repair_torchvision() is None
    assert peers.repair_torchvision() is None
    timm, reason = peers.import_timm()
    assert timm is not None, reason


def test_a_failed_row_shows_no_speed(tmp_path: Path) -> None:
    failed = row("fastvit", status="FAILED", ratio=None, images_per_s=None, median_ms=None, note="max error 1")
    lines = table.plain([row(), failed]).splitlines()
    assert lines[0].split()[:5] == ["model", "batch", "dtype", "provider", "img/s"]
    assert lines[1].split()[3:6] == ["eager", "500.0", "2.00"]
    assert lines[2].split()[3:9] == ["fastvit", "-", "-", "-", "-", "FAILED"]
    assert "fastvit: max error 1" in table.footnotes([row(), failed], {"triton": "no GPU"})
    rows.write(tmp_path / "rows.csv", [row(), failed])
    assert table.plain(rows.read(tmp_path / "rows.csv")) == table.plain([row(), failed])
