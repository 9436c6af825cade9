"""Other projects' engines for the same model on a CPU, as peers: optional, each imported only where it is measured.

A peer that is absent, or has no such dtype, is named with the reason. All of them get the weights and images of the
eager model they stand beside, prepared before the clock starts, and hand their logits out as torch tensors.
"""

import contextlib
import copy
import functools
import importlib.metadata
import importlib.util
import io
import logging
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from . import cases, measure, peers

INSTALL = 'pip install "fastvit[peers]"'
_NO_INT8 = "PyTorch quantises for it only with a package of its own"


@dataclass(frozen=True)
class Engine:
    """A peer: its name in rows, the function that builds it, the modules it imports, the dtypes it has not.

    build: (eager model, images (B, C, height, width), name of a dtype) -> provider; in int8 the model is float32.
    """

    name: str
    build: Callable[[torch.nn.Module, torch.Tensor, str], measure.Provider]
    modules: tuple[str, ...] = ()
    int8_modules: tuple[str, ...] = ()
    lacks: Mapping[str, str] = field(default_factory=dict)

    def why_not(self, dtype: str) -> str | None:
        """Why it cannot be measured in a dtype, or None: one sentence, with the command that would help."""
        if dtype in self.lacks:
            return self.lacks[dtype]
        modules = self.modules + (self.int8_modules if dtype == cases.INT8 else ())
        absent = [name for name in modules if importlib.util.find_spec(name) is None]
        if absent:
            return f"{', '.join(absent)} is not installed:  {INSTALL}"
        return next((reason for name in modules if (reason := _why_not_imported(name)) is not None), None)


def left_out(dtypes: Sequence[str]) -> dict[str, str]:
    """The peers that take no part, or not in every dtype, by name and where it matters dtype, with the reason."""
    found = {}
    for engine in ENGINES:
        reasons = {dtype: reason for dtype in dtypes if (reason := engine.why_not(dtype)) is not None}
        if len(reasons) == len(dtypes) and len(set(reasons.values())) == 1:
            found[engine.name] = next(iter(reasons.values()))
        else:
            found.update({f"{engine.name} ({dtype})": reason for dtype, reason in reasons.items()})
    return found


@functools.cache
def _why_not_imported(module: str) -> str | None:
    reason = peers.try_import(module)
    if reason is None:
        return None
    installed = importlib.metadata.version(module)
    return f"{reason} ({module} {installed}, torch {torch.__version__})"


def _compiled(
    name: str, how: Mapping[str, Any], model: torch.nn.Module, batch: torch.Tensor, dtype: str
) -> measure.Provider:
    """torch.compile with the weights as constants, packed ahead; the setting counts only while it is global.

    zentorch leaves a pass of its own in the compiler's settings, where others would inherit it.
    """
    import torch._inductor.config as inductor

    compiled = torch.compile(model, **how)
    restored = {"freezing": True, "joint_custom_post_pass": inductor.joint_custom_post_pass}
    with inductor.patch(restored), torch.inference_mode():
        compiled(batch)
    return measure.Provider(name, functools.partial(compiled, batch))


# The option alone does nothing, but keeps these graphs apart from those of a plain torch.compile.
_freezing = functools.partial(_compiled, "compile-freezing", {"options": {"freezing": True}})
_zentorch = functools.partial(_compiled, "zentorch", {"backend": "zentorch"})


def _onnxruntime(model: torch.nn.Module, batch: torch.Tensor, dtype: str) -> measure.Provider:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.log_severity_level = 3  # errors
    with tempfile.TemporaryDirectory() as folder, _silence():
        path = Path(folder) / "model.onnx"
        torch.onnx.export(model, (batch,), path, dynamo=True, verbose=False)
        if dtype == cases.INT8:
            path = _quantised_onnx(path)
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    feed = {session.get_inputs()[0].name: batch.numpy()}
    return measure.Provider("onnxruntime", lambda: torch.from_numpy(session.run(None, feed)[0]))


def _quantised_onnx(path: Path) -> Path:
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic

    model = onnx.load(path)
    del model.graph.value_info[:]  # the quantiser transposes the head's weight and trips over its former shape
    target = path.with_stem("int8")
    quantize_dynamic(model, target, op_types_to_quantize=["MatMul"], per_channel=True, weight_type=QuantType.QInt8)
    return target


def _openvino(hint: str, model: torch.nn.Module, batch: torch.Tensor, dtype: str) -> measure.Provider:
    """One request for latency; for throughput as many side by side as OpenVINO asks for, a batch each."""
    import openvino

    images = batch.float().numpy()
    with _silence(), torch.no_grad():
        converted = openvino.convert_model(_in_float32(model), example_input=batch.float(), input=[tuple(batch.shape)])
        if dtype == cases.INT8:
            converted = _quantised_openvino(converted, images)
    settings = {
        "PERFORMANCE_HINT": hint,
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "INFERENCE_PRECISION_HINT": "f32" if dtype == "float32" else "bf16",
    }
    compiled = openvino.Core().compile_model(converted, "CPU", settings)
    name = f"openvino-{hint.lower()}"
    if hint == "LATENCY":
        request = compiled.create_infer_request()
        return measure.Provider(name, lambda: torch.from_numpy(request.infer(images, share_inputs=True)[0]))
    count = compiled.get_property("OPTIMAL_NUMBER_OF_INFER_REQUESTS")
    queue = openvino.AsyncInferQueue(compiled, count)

    def side_by_side() -> torch.Tensor:
        for _ in range(count):
            queue.start_async(images, share_inputs=True)
        queue.wait_all()
        logits = [torch.from_numpy(request.get_output_tensor(0).data.copy()) for request in queue]
        return logits[0]

    note = f"{count} batches side by side, the time divided by {count}"
    return measure.Provider(name, side_by_side, batches=count, note=note)


def _in_float32(model: torch.nn.Module) -> torch.nn.Module:
    """The model with the same, already rounded, weights: how an engine is handed a model that it computes in less."""
    return copy.deepcopy(model).float()


def _quantised_openvino(converted: Any, images: Any) -> Any:
    import nncf

    nncf.set_log_level(logging.ERROR)  # it would rather have 300 images
    return nncf.quantize(converted, nncf.Dataset([images]), model_type=nncf.ModelType.TRANSFORMER)


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """Exporters print and warn about what they do, on the streams where the table goes."""
    with (
        warnings.catch_warnings(),
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(io.StringIO()),
    ):
        warnings.simplefilter("ignore")
        yield


ENGINES = (
    Engine(
        "onnxruntime",
        _onnxruntime,
        ("onnx", "onnxscript", "onnxruntime"),
        lacks={"bfloat16": "its CPU kernels have no bfloat16", "float16": "its CPU kernels compute float16 in float32"},
    ),
    *(
        Engine(
            f"openvino-{hint.lower()}",
            functools.partial(_openvino, hint),
            ("openvino",),
            ("nncf",),
            {"float16": "its CPU kernels compute float16 in float32"},
        )
        for hint in ("LATENCY", "THROUGHPUT")
    ),
    Engine("zentorch", _zentorch, ("zentorch",), lacks={"int8": _NO_INT8, "float16": "it has no float16"}),
    Engine("compile-freezing", _freezing, lacks={"int8": _NO_INT8}),
)
