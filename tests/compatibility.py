"""What keeps working on an accelerated model: a function per column of the README's table, and the run that writes it.

    python tests/compatibility.py --csv benchmarks/results/compatibility.csv

Every number is an error against the untouched model in fp64, in units of the untouched model's own in the same dtype.
"""

from __future__ import annotations

import argparse
import copy
import functools
import importlib.util
import io
import re
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from fastvit.benchmarks.peers import repair_torchvision
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import fastvit
from fastvit.benchmarks import compatibility as table, environment

repair_torchvision()

import transformers  # noqa: E402
from architectures import ARCHITECTURES, Architecture  # noqa: E402
from tolerances import compare  # noqa: E402

Tensors = dict[str, Tensor]
BLOCK = re.compile(r"(?:^|\.)(?:blocks|\w*layers?)\.(?:encoder_layer_)?\d+$")


class Incompatible(AssertionError):
    """An accelerated model does not do what the untouched one does."""


class LibraryLimit(Exception):
    """The untouched model cannot do it either."""


def require(condition: bool, message: str) -> None:
    if not condition:
        raise Incompatible(message)


def floats(output: Any) -> Tensors:
    """Every floating-point tensor of a model's output, by its place in it."""
    leaves, _ = pytree.tree_flatten_with_path(output)
    return {
        pytree.keystr(path) or "output": leaf
        for path, leaf in leaves
        if isinstance(leaf, Tensor) and leaf.is_floating_point()
    }


def cast(tensors: Tensors, dtype: torch.dtype) -> Tensors:
    return {name: t.to(dtype) if t.is_floating_point() else t for name, t in tensors.items()}


def forward(model: nn.Module, inputs: Tensors) -> Tensors:
    with torch.no_grad():
        return floats(model(**inputs))


def gradients(model: Callable[..., Any], parameters: dict[str, nn.Parameter], inputs: Tensors) -> Tensors:
    """The gradient of each parameter that has one, of every output's sum weighted at random."""
    generator = torch.Generator().manual_seed(11)
    total = torch.zeros((), dtype=torch.float64)
    for y in floats(model(**inputs)).values():
        weights = torch.randn(y.shape, generator=generator).to(y.dtype)
        total = total + (y * weights).sum().double()
    trainable = {name: p for name, p in parameters.items() if p.requires_grad}
    found = torch.autograd.grad(total, list(trainable.values()), allow_unused=True)
    return {name: grad for name, grad in zip(trainable, found, strict=True) if grad is not None}


def trained(model: nn.Module, inputs: Tensors) -> Tensors:
    return gradients(model, dict(model.named_parameters()), inputs)


def ratio(got: Tensors, exact: Tensors, eager: Tensors, gradient: bool = False) -> float:
    """The largest error in units of eager's largest; Incompatible unless each tensor keeps the tolerance rule."""
    require(got.keys() == exact.keys() == eager.keys(), f"other outputs: {sorted(got.keys() ^ exact.keys())}")
    for name, tensor in got.items():
        reason = compare(tensor, exact[name], eager[name], gradient)
        require(reason is None, f"{name}: {reason}")

    def largest(tensors: Tensors) -> float:
        return max(
            ((t.double() - exact[name]).abs().max().item() for name, t in tensors.items() if t.numel()), default=0.0
        )

    return largest(got) / max(largest(eager), 1e-30)


@dataclass(frozen=True)
class Yardstick:
    """What the untouched model gives in one dtype, and what it would give in exact arithmetic on the same numbers."""

    eager: Tensors
    exact: Tensors


class Case:
    """An architecture with what its untouched model says, computed once."""

    def __init__(self, architecture: Architecture) -> None:
        self.architecture = architecture
        self.model = architecture.build()
        self.inputs = architecture.inputs()

    def copy(self, dtype: torch.dtype = torch.float32) -> nn.Module:
        """The untouched model, in another dtype perhaps."""
        return copy.deepcopy(self.model).to(dtype)

    def accelerated(self, dtype: torch.dtype = torch.float32) -> nn.Module:
        return fastvit.accelerate(self.copy(dtype))

    @functools.cache  # noqa: B019  (as many cases as architectures, kept on purpose)
    def outputs(self, dtype: torch.dtype) -> Yardstick:
        model, inputs = self.copy(dtype), cast(self.inputs, dtype)
        eager = forward(model, inputs)
        return Yardstick(eager, forward(model.double(), cast(inputs, torch.float64)))

    @functools.cache  # noqa: B019
    def gradients(self) -> Yardstick:
        model = self.copy().train()
        eager = trained(model, self.inputs)
        exact = trained(self.copy(torch.float64).train(), cast(self.inputs, torch.float64))
        return Yardstick(eager, exact)

    @functools.cache  # noqa: B019
    def fused(self) -> Fused:
        return fused_blocks(self.accelerated())


@functools.cache
def case(name: str) -> Case:
    return Case(ARCHITECTURES[name])


@dataclass(frozen=True)
class Fused:
    """How many of a model's blocks are fused: as a whole, in parts, of how many; and why the others are not."""

    whole: int
    parts: int
    total: int
    reasons: tuple[str, ...]


def fused_blocks(model: nn.Module) -> Fused:
    names = [
        n
        for n, m in model.named_modules()
        if BLOCK.search(n) and "backbone" not in n and next(m.parameters(), None) is not None
    ]
    rows = {row.name: row for row in fastvit.report(model)}
    used = [row.name for row in rows.values() if row.fused]
    whole = [n for n in names if n in used]
    parts = [n for n in names if n not in whole and any(row.startswith(f"{n}.") for row in used)]
    reasons: dict[str, None] = {}
    for name in names:
        if name not in whole:
            row = rows.get(name)
            kind = type(model.get_submodule(name)).__name__
            silent = "its parts are fused one by one" if name in parts else "no fused form is known"
            reasons[f"{kind}: {row.reason if row else silent}"] = None
    return Fused(len(whole), len(parts), len(names), tuple(reasons))


def eval_fp32(case: Case) -> float:
    """Outputs in fp32, in eval mode."""
    stick = case.outputs(torch.float32)
    return ratio(forward(case.accelerated(), case.inputs), stick.exact, stick.eager)


def bf16(case: Case) -> float:
    """Outputs of a model whose parameters are bf16."""
    stick = case.outputs(torch.bfloat16)
    got = forward(case.accelerated(torch.bfloat16), cast(case.inputs, torch.bfloat16))
    return ratio(got, stick.exact, stick.eager)


def training(case: Case) -> float:
    """Every parameter's gradient in fp32, in training mode."""
    stick = case.gradients()
    return ratio(trained(case.accelerated().train(), case.inputs), stick.exact, stick.eager, gradient=True)


@contextmanager
def unless_the_library_fails(attempt: Callable[[], Any]) -> Iterator[None]:
    """Turn an error inside into LibraryLimit if the untouched model fails at the same, else into Incompatible."""
    try:
        yield
    except (Incompatible, LibraryLimit):
        raise
    except Exception as error:
        try:
            attempt()
        except Exception as theirs:
            raise LibraryLimit(first_line(theirs)) from error
        raise Incompatible(first_line(error)) from error


def first_line(error: BaseException) -> str:
    lines = [line.strip() for line in re.sub(r"\x1b\[\d+m", "", str(error)).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:200]


def _compiled(model: nn.Module, inputs: Tensors) -> tuple[Tensors, Tensors]:
    torch._dynamo.reset()
    graph = torch.compile(model, fullgraph=True, backend="aot_eager")
    return forward(graph, inputs), gradients(graph, dict(model.named_parameters()), inputs)


def compiled(case: Case) -> float:
    """torch.compile in one graph: outputs, and gradients in training mode."""
    with unless_the_library_fails(lambda: _compiled(case.copy().train(), case.inputs)):
        torch._dynamo.reset()
        model = case.accelerated()
        graph = torch.compile(model, fullgraph=True, backend="aot_eager")
        stick, slopes = case.outputs(torch.float32), case.gradients()
        outputs = ratio(forward(graph, case.inputs), stick.exact, stick.eager)
        found = gradients(graph.train(), dict(model.named_parameters()), case.inputs)
        return max(outputs, ratio(found, slopes.exact, slopes.eager, gradient=True))


def export(model: nn.Module, inputs: Tensors) -> torch.export.ExportedProgram:
    with torch.no_grad():
        return torch.export.export(model, (), dict(inputs))


def exported(case: Case) -> float:
    """torch.export, saved and loaded; with the reference backend nothing but PyTorch's ops."""
    with unless_the_library_fails(lambda: export(case.copy(), case.inputs)):
        model, stick = case.accelerated(), case.outputs(torch.float32)
        file = io.BytesIO()
        torch.export.save(export(model, case.inputs), file)
        file.seek(0)
        program = torch.export.load(file).module()
        got = forward(program, case.inputs)
        with fastvit.backend("reference"):
            plain = export(model, case.inputs)
        ours = {str(node.target) for node in plain.graph.nodes if "fastvit" in str(node.target)}
        require(not ours, f"the reference's graph holds {sorted(ours)}")
        ratio(forward(plain.module(), case.inputs), stick.exact, stick.eager)
        return ratio(got, stick.exact, stick.eager)


def why_no_onnx() -> str | None:
    missing = [name for name in ("onnx", "onnxscript", "onnxruntime") if importlib.util.find_spec(name) is None]
    return f"{', '.join(missing)} not installed" if missing else None


def _onnx(model: nn.Module, inputs: Tensors) -> Any:
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.onnx.export(model, (), kwargs=dict(inputs), dynamo=True, verbose=False)


def onnx(case: Case) -> float:
    """ONNX, for which fastvit takes its reference by itself, run by ONNX Runtime."""
    import onnxruntime

    with unless_the_library_fails(lambda: _onnx(case.copy(), case.inputs)):
        program = _onnx(case.accelerated(), case.inputs)
        session = onnxruntime.InferenceSession(
            program.model_proto.SerializeToString(), providers=["CPUExecutionProvider"]
        )
        names = [given.name for given in session.get_inputs()]
        feeds = {name: t.numpy() for name, t in case.inputs.items() if name in names}
        stick = case.outputs(torch.float32)
        found = [torch.from_numpy(y) for y in session.run(None, feeds)]
        found = [y for y in found if y.is_floating_point()]
        got = dict(zip(stick.exact, found, strict=True))
        return ratio(got, stick.exact, stick.eager)


def state_dict(case: Case) -> str:
    """Keys, a strict load both ways, and save_pretrained / from_pretrained where the library has them."""
    untouched, model = case.copy(), case.accelerated()
    keys = list(untouched.state_dict())
    require(list(model.state_dict()) == keys, "accelerate changed the keys")
    want = forward(untouched, case.inputs)
    with torch.no_grad():
        for p in untouched.parameters():
            p.add_(0.01)
    moved = forward(untouched, case.inputs)
    model.load_state_dict(untouched.state_dict(), strict=True)
    same(forward(fastvit.restore(copy.deepcopy(model)), case.inputs), moved, "loaded into an accelerated model")
    stick = case.outputs(torch.float32)
    untouched.load_state_dict(case.accelerated().state_dict(), strict=True)
    same(forward(untouched, case.inputs), want, "loaded from an accelerated model")
    model.load_state_dict(untouched.state_dict(), strict=True)
    ratio(forward(model, case.inputs), stick.exact, stick.eager)  # packed copies of weights followed
    if hasattr(model, "save_pretrained"):
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            loaded = type(model).from_pretrained(folder).eval()
        same(forward(loaded, case.inputs), want, "from_pretrained of what an accelerated model saved")
    return "same"


def same(got: Tensors, want: Tensors, what: str) -> None:
    require(got.keys() == want.keys() and all(torch.equal(got[n], want[n]) for n in want), f"{what}: other numbers")


def restored(case: Case) -> str:
    """Bit-identical outputs, no attribute left in any module, no class changed."""
    model = case.copy()
    classes = {type(m) for m in model.modules()}
    forwards = {kind: kind.forward for kind in classes}
    want = forward(model, case.inputs)
    before = {name: dict(m.__dict__) for name, m in model.named_modules()}  # with what the library notes at first use
    fastvit.accelerate(model)
    forward(model, case.inputs)
    trained(model, case.inputs)
    fastvit.restore(model)
    for name, module in model.named_modules():
        now = module.__dict__
        changed = [
            k for k in {*now, *before[name]} if k not in now or k not in before[name] or now[k] is not before[name][k]
        ]
        require(not changed, f"{name or 'model'}: {changed} differ behind restore")
    require(all(kind.forward is f for kind, f in forwards.items()), "a class's forward was changed")
    same(forward(model, case.inputs), want, "restored")
    return "same"


CHECKS: dict[str, Callable[[Case], float | str]] = dict(
    zip(table.CHECKS, (eval_fp32, bf16, training, compiled, exported, onnx, state_dict, restored), strict=True)
)


def entry(check: str, given: Case) -> str:
    """A cell of the table: the ratio, or a word of ``fastvit.benchmarks.compatibility`` and what there is to say."""
    missing = why_no_onnx() if check == "ONNX" else None
    if missing:
        return f"{table.ABSENT} {missing}"
    try:
        found = CHECKS[check](given)
    except LibraryLimit as limit:
        return f"{table.LIBRARY} {limit}"
    except Exception as error:
        return f"{table.FAILED} {first_line(error)}"
    return found if isinstance(found, str) else f"{found:.2f}"


def row(architecture: Architecture) -> dict[str, str]:
    """One architecture's row, without what it was measured with."""
    given = Case(architecture)
    fused = given.fused()
    return {
        "library": architecture.package,
        "model": architecture.family,
        "fused": str(fused.whole),
        "parts": str(fused.parts),
        "blocks": str(fused.total),
        **{check: entry(check, given) for check in CHECKS},
        "eager": "; ".join(fused.reasons),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description="Write the rows of the README's compatibility table.")
    parser.add_argument("--csv", type=Path, help="where to write them")
    parser.add_argument("--only", default="", help="architectures whose name contains this")
    given = parser.parse_args()
    transformers.utils.logging.disable_progress_bar()
    stamp = {name: str(value) for name, value in environment.stamp(torch.device("cpu")).items()}
    stamp |= {name: environment.version(name) for name in ("transformers", "torchvision")}
    stamp = {name: value for name, value in stamp.items() if name in table.COLUMNS}
    rows = []
    for architecture in ARCHITECTURES.values():
        if given.only.lower() in architecture.name.lower():
            rows.append({**row(architecture), **stamp})
            print(*list(rows[-1].values())[: len(table.CHECKS) + 6], sep=" | ", flush=True)
    if given.csv:
        table.write(rows, given.csv)
    failed = table.failures(rows)
    print(f"{len(rows)} models, {len(failed)} failures", *failed, sep="\n")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
