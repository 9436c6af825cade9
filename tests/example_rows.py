"""Benchmark rows that nobody measured: whole models and ops of one device, one of each kind of trouble among them."""

from collections.abc import Iterator

from fastvit.benchmarks import cases, op_cases, rows

HOSTILE = '<script>alert("x")</script> & "more"'
_RATES = {"float32": 500.0, "bfloat16": 900.0}
_COPY = 35.0
_STAMP = {
    "device": "a chip, 2 threads",
    "eager": "timm 1.0",
    "images": "two photographs",
    "note": "",
    "date": "2026-01-02T03:04:05Z",
    "threads": 2,
    "fastvit": "0.1.0",
    "torch": "2.13.0",
    "python": "3.11",
    "commit": "abc",
}


def models(
    names: tuple[str, ...] = ("vit_small_patch16_224", "vit_base_patch16_224"),
    batches: tuple[int, ...] = (1, 8),
    dtypes: tuple[str, ...] = ("float32", "bfloat16"),
) -> list[dict]:
    """Forward passes and training steps with five providers; in training torch.compile has failed."""
    found = []
    for name in names:
        for dtype in dtypes:
            for batch in batches:
                for direction in cases.DIRECTIONS:
                    case = cases.Case(name, batch, dtype, direction)
                    about = {
                        "case": name,
                        "shape": case.shape,
                        "dtype": dtype,
                        "direction": direction,
                        "level": rows.MODEL,
                    }
                    speeds = {"eager": 1.0, "compile": 1.2, "onnxruntime": 1.6, "fastvit-cpu": 1.9, "fastvit": 2.0}
                    measured = _measured(about, case.flops, case.bytes or 0, speeds)
                    found += [_failed(row) if _compiled(row) else row for row in measured]
    return found


def _compiled(row: dict) -> bool:
    return row["provider"] == "compile" and row["direction"] == cases.TRAINING


def ops(tokens: tuple[int, ...] = (50, 197, 577), batches: tuple[int, ...] = (1, 8)) -> list[dict]:
    """Every op forward in one dtype, attention with one more provider; fastvit's block has failed."""
    found = []
    for op in op_cases.OPS:
        for batch in batches:
            for count in tokens[1:2] if op in ("patch_embed", "group_norm") else tokens:
                case = op_cases.at_model(op, "vit_base_patch16_224", batch, "float32", "forward", count)
                about = {"case": op, "shape": case.shape, "dtype": "float32", "direction": "forward", "level": rows.OP}
                speeds = {"eager": 1.0, "fastvit": 1.5, **({"sdpa-flash": 1.4} if op == "attention" else {})}
                found += _measured(about, case.work.flops, case.work.bytes(4), speeds)
    return [_failed(row) if (row["case"], row["provider"]) == ("block", "fastvit") else row for row in found]


def _measured(about: dict, flops: int, moved: int, speeds: dict[str, float]) -> Iterator[dict]:
    gflops = _RATES[about["dtype"]]
    least = max(flops / gflops, moved / _COPY) / 1e6
    for provider, speed in speeds.items():
        ms = (3 * least + 0.01) / speed
        yield {
            **dict.fromkeys(rows.COLUMNS, ""),
            **_STAMP,
            **about,
            "provider": provider,
            "status": "ok",
            "median_ms": ms,
            "p20_ms": 0.97 * ms,
            "p80_ms": 1.05 * ms,
            "ratio": speed,
            "repeats": 20,
            "max_error": 1e-6,
            "error_ratio": 0.9 * speed,
            "peak_mib": 100.0 / speed**2,
            "flops": flops,
            "bytes": moved or "",
            "ceiling_gflops": gflops,
            "ceiling_gbs": _COPY,
            "ceiling_share": least / ms,
        }


def _failed(row: dict) -> dict:
    speed = ("median_ms", "p20_ms", "p80_ms", "ratio", "ceiling_share", "peak_mib", "repeats")
    return {**row, **dict.fromkeys(speed, ""), "status": "FAILED", "note": HOSTILE}
