"""Who else runs the same model: other projects' engines and compilers, and other libraries' own models.

Each is optional and imported only where it is measured; one that is absent, or does not serve a device or dtype, is
named with the reason. All of them get the weights and images of the eager model they stand beside, prepared before the
clock starts, and hand their logits out as torch tensors.
"""

import contextlib
import copy
import functools
import io
import logging
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from . import cases, compilers, environment, libraries, measure, peers

INSTALL = 'pip install "fastvit[peers]"'
_IN_FLOAT32 = "its CPU kernels compute float16 in float32"


@dataclass(frozen=True)
class Engine:
    """One row's worth of competition, or several that share what is costly to prepare.

    names: of the providers it builds. build: (eager model, images (B, C, height, width), name of a dtype) -> providers
    in that order; in int8 the model is float32. modules: what it imports, int8_modules: and for int8. devices: the
    types it runs on. lacks: reasons by dtype. install: the command that brings it. refuses: another reason not to
    measure it here. on_request: why it is left out unless it is asked for by name.
    """

    names: tuple[str, ...]
    build: Callable[[torch.nn.Module, torch.Tensor, str], Sequence[measure.Provider]]
    modules: tuple[str, ...] = ()
    int8_modules: tuple[str, ...] = ()
    devices: tuple[str, ...] = ("cpu", "cuda")
    lacks: Mapping[str, str] = field(default_factory=dict)
    install: str = INSTALL
    refuses: Callable[[str], str | None] = lambda device: None
    on_request: Mapping[str, str] = field(default_factory=dict)

    def why_not(self, dtype: str, device: str = "cpu") -> str | None:
        """Why it cannot be measured in a dtype on a type of device, or None: one sentence."""
        if device not in self.devices:
            return f"it runs on {' and '.join(self.devices)} alone"
        if dtype in self.lacks:
            return self.lacks[dtype]
        modules = self.modules + (self.int8_modules if dtype == cases.INT8 else ())
        return peers.why_absent(modules, self.install) or self.refuses(device)


def chosen(requested: Sequence[str], device: str) -> tuple[tuple[Engine, ...], dict[str, str]]:
    """The engines of these names, or all that need no request, and why the others are left out."""
    if requested:
        return tuple(engine for engine in ENGINES if set(engine.names) & set(requested)), {}
    slow = {
        name: engine.on_request[device] for engine in ENGINES for name in engine.names if device in engine.on_request
    }
    return tuple(engine for engine in ENGINES if not set(engine.names) & set(slow)), slow


def left_out(engines: Sequence[Engine], dtypes: Sequence[str], device: str = "cpu") -> dict[str, str]:
    """The engines that take no part, or not in every dtype, by name and where it matters dtype, with the reason."""
    found = {}
    for engine in engines:
        reasons = {dtype: reason for dtype in dtypes if (reason := engine.why_not(dtype, device)) is not None}
        for name in engine.names:
            if len(reasons) == len(dtypes) and len(set(reasons.values())) == 1:
                found[name] = next(iter(reasons.values()))
            else:
                found.update({f"{name} ({dtype})": reason for dtype, reason in reasons.items()})
    return found


def _onnxruntime(model: torch.nn.Module, batch: torch.Tensor, dtype: str) -> list[measure.Provider]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.log_severity_level = 3  # errors
    where = "CUDAExecutionProvider" if batch.is_cuda else "CPUExecutionProvider"
    with tempfile.TemporaryDirectory() as folder, _silence():
        path = Path(folder) / "model.onnx"
        torch.onnx.export(model, (batch,), path, dynamo=True, verbose=False)
        if dtype == cases.INT8:
            path = _quantised_onnx(path)
        session = onnxruntime.InferenceSession(path, options, providers=[where])
    if where not in session.get_providers():
        raise RuntimeError(f"this ONNX Runtime has no {where}")
    name, result = session.get_inputs()[0].name, session.get_outputs()[0].name
    if not batch.is_cuda:
        feed = {name: batch.numpy()}
        return [measure.Provider("onnxruntime", lambda: torch.from_numpy(session.run(None, feed)[0]))]
    logits = batch.new_empty(session.get_outputs()[0].shape)
    binding = session.io_binding()  # images and logits stay on the GPU
    for bind, label, tensor in ((binding.bind_input, name, batch), (binding.bind_output, result, logits)):
        kind = str(tensor.dtype).removeprefix("torch.")
        bind(label, "cuda", tensor.get_device(), kind, tuple(tensor.shape), tensor.data_ptr())

    def run() -> torch.Tensor:
        torch.cuda.current_stream().synchronize()  # its stream is its own
        session.run_with_iobinding(binding)
        return logits

    return [measure.Provider("onnxruntime", run)]


def _quantised_onnx(path: Path) -> Path:
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic

    model = onnx.load(path)
    del model.graph.value_info[:]  # the quantiser transposes the head's weight and trips over its former shape
    target = path.with_stem("int8")
    quantize_dynamic(model, target, op_types_to_quantize=["MatMul"], per_channel=True, weight_type=QuantType.QInt8)
    return target


def _openvino(model: torch.nn.Module, batch: torch.Tensor, dtype: str) -> list[measure.Provider]:
    """One request for latency; for throughput as many side by side as OpenVINO asks for, a batch each."""
    import openvino

    images = batch.float().numpy()
    with _silence(), torch.no_grad():
        converted = openvino.convert_model(_in_float32(model), example_input=batch.float(), input=[tuple(batch.shape)])
        if dtype == cases.INT8:
            converted = _quantised_openvino(converted, images)
    settings = {
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "INFERENCE_PRECISION_HINT": "f32" if dtype == "float32" else "bf16",
    }
    compiled = {
        hint: openvino.Core().compile_model(converted, "CPU", {**settings, "PERFORMANCE_HINT": hint})
        for hint in ("LATENCY", "THROUGHPUT")
    }
    request = compiled["LATENCY"].create_infer_request()
    count = compiled["THROUGHPUT"].get_property("OPTIMAL_NUMBER_OF_INFER_REQUESTS")
    queue = openvino.AsyncInferQueue(compiled["THROUGHPUT"], count)

    def side_by_side() -> torch.Tensor:
        for _ in range(count):
            queue.start_async(images, share_inputs=True)
        queue.wait_all()
        logits = [torch.from_numpy(request.get_output_tensor(0).data.copy()) for request in queue]
        return logits[0]

    note = f"{count} batches side by side, the time divided by {count}"
    return [
        measure.Provider("openvino-latency", lambda: torch.from_numpy(request.infer(images, share_inputs=True)[0])),
        measure.Provider("openvino-throughput", side_by_side, batches=count, note=note),
    ]


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


def _why_not_amd(device: str) -> str | None:
    vendor = environment.cpu_vendor()
    return None if vendor == "AuthenticAMD" else f"it is made for AMD's processors, this one is {vendor or 'unknown'}"


_NO_INT8 = {cases.INT8: "PyTorch quantises for it only with a package of its own"}
ENGINES = (
    Engine(
        ("onnxruntime",),
        _onnxruntime,
        ("onnx", "onnxscript", "onnxruntime"),
        lacks={"bfloat16": "its kernels have no bfloat16 for a ViT", "float16": _IN_FLOAT32},
    ),
    Engine(
        ("openvino-latency", "openvino-throughput"),
        _openvino,
        ("openvino",),
        ("nncf",),
        devices=("cpu",),
        lacks={"float16": _IN_FLOAT32},
    ),
    Engine(
        ("zentorch",),
        compilers.zentorch,
        ("zentorch",),
        devices=("cpu",),
        lacks={**_NO_INT8, "float16": "it has no float16"},
        refuses=_why_not_amd,
    ),
    Engine(("compile-freezing",), compilers.freezing, devices=("cpu",), lacks=_NO_INT8),
    Engine(
        ("compile-max-autotune",),
        compilers.max_autotune,
        lacks=_NO_INT8,
        on_request={"cpu": "it tries kernels for a minute per case: --peer compile-max-autotune"},
    ),
    Engine(
        ("tensorrt",),
        compilers.tensorrt,
        ("torch_tensorrt",),
        devices=("cuda",),
        lacks=_NO_INT8,
        install="pip install torch-tensorrt",
    ),
    Engine(
        ("transformers", "fastvit-transformers"),
        functools.partial(libraries.build, "transformers"),
        ("transformers",),
        lacks=_NO_INT8,
        install="pip install transformers",
    ),
    Engine(
        ("torchvision", "fastvit-torchvision"),
        functools.partial(libraries.build, "torchvision"),
        lacks=_NO_INT8,
        refuses=lambda device: peers.repair_torchvision(),
    ),
)
