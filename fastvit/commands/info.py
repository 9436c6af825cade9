"""`fastvit info`: what is installed, what the machine has, and which backend runs what."""

import json as json_module
from collections.abc import Iterable
from typing import Any

import rich.console

from .terminal import Json, benchmarks


def info(json: Json = False) -> None:
    """Versions, processor, GPUs, and what every backend can do here, or why it cannot."""
    described = {**benchmarks("environment").describe(), "backends": _backends()}
    if json:
        print(json_module.dumps(described, indent=2))
        return
    for name, lines in _sections(described):
        rich.console.Console(soft_wrap=True, highlight=False, markup=False).print(name, style="bold")
        for left, right in lines:
            print(f"  {left:<14}{right}")


def _backends() -> dict[str, dict[str, Any]]:
    """For each backend: why it is unavailable as a whole, and why for each op; None means that it can run."""
    import torch

    import fastvit
    from fastvit import backends

    gpu = torch.cuda.is_available()
    found: dict[str, dict[str, Any]] = {}
    for name in backends.BACKENDS:
        on_gpu = gpu and name in ("triton", "cuda")
        samples = _sample_calls("cuda" if on_gpu else "cpu", torch.bfloat16 if on_gpu else torch.float32)
        reasons = {op: fastvit.why_not(op, *arguments, backend=name) for op, arguments in samples.items()}
        found[name] = {"why_unavailable": backends.why_unavailable(name), "ops": reasons}
    return found


def _sample_calls(device: str, dtype: Any) -> dict[str, tuple]:
    """ViT-S/16 arguments for the public function of every op; the answers depend on shapes, never on values."""
    import torch

    from fastvit.ops import EncoderBlock

    def zeros(*shape: int) -> torch.Tensor:
        return torch.zeros(shape, device=device, dtype=dtype)

    x, norm = zeros(1, 197, 384), (zeros(384), zeros(384))
    heads = zeros(1, 6, 197, 64)
    attention = (zeros(1152, 384), zeros(1152), zeros(384, 384), zeros(384))
    mlp = (zeros(1536, 384), zeros(1536), zeros(384, 1536), zeros(384))
    return {
        "patch_embed": (zeros(1, 3, 224, 224), zeros(384, 3, 16, 16), zeros(384)),
        "layer_norm": (x, *norm, 1e-6),
        "group_norm": (zeros(1, 64, 112, 112), 32, zeros(64), zeros(64), 1e-5),
        "attention": (heads, heads, heads),
        "linear": (x, zeros(1152, 384), zeros(1152)),
        "norm_mlp": (x, *norm, *mlp, 1e-6),
        "encoder": (x, [EncoderBlock(*norm, *attention, None, *norm, *mlp, None)], 6),
    }


def _sections(described: dict[str, Any]) -> Iterable[tuple[str, list[tuple[str, str]]]]:
    yield "versions", [(name, value or "not installed") for name, value in described["versions"].items()]
    cpu = described["cpu"]
    machine = [
        ("system", described["system"]),
        ("cpu", f"{cpu['name']}, {cpu['cores']} cores, torch uses {cpu['threads']} threads"),
        ("features", " ".join(cpu["features"]) or "none known"),
    ]
    for gpu in described["gpus"]:
        text = f"{gpu['name']}, sm_{gpu['capability'].replace('.', '')}, {gpu['memory_gib']} GiB"
        machine.append(("gpu", f"{text}, {gpu['multiprocessors']} multiprocessors"))
    yield "machine", machine if described["gpus"] else [*machine, ("gpu", "none that torch can use")]
    if described["environment"]:
        yield "environment", list(described["environment"].items())
    for name, backend in described["backends"].items():
        can = [op for op, reason in backend["ops"].items() if reason is None]
        lines = [("runs", ", ".join(can) or "nothing here")]
        whole = backend["why_unavailable"]
        if whole:
            lines.append(("unavailable", whole))
        else:
            lines += [(op, reason) for op, reason in backend["ops"].items() if reason is not None]
        yield f"backend {name}", lines
