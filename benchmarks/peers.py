"""The models fastvit is measured against: timm's as they come, or its own reference where timm cannot be imported."""

import functools
import importlib
import importlib.metadata
import importlib.util
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType

import torch

_SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "roi_align(Tensor input, Tensor rois, float spatial_scale, int pooled_height, int pooled_width, "
    "int sampling_ratio, bool aligned) -> Tensor",
)
_LIBRARIES: list[torch.library.Library] = []  # a Library that is collected takes its schemas with it


def repair_torchvision() -> str | None:
    """Make `import torchvision` work when its wheel was built for a torch with CUDA and this torch has none.

    Such a wheel cannot load its compiled part, and its Python part then fails on three missing op schemas. They are
    defined here, without implementations, and only when the import fails for exactly that reason.

    Returns:
        None when torchvision can be imported, else one sentence that says why it cannot.
    """
    if "torchvision" in sys.modules:
        return None
    if importlib.util.find_spec("torchvision") is None:
        return "torchvision is not installed"
    failure = try_import("torchvision")
    if failure is None or "operator torchvision::" not in failure:
        return failure
    _forget("torchvision")
    library = torch.library.Library("torchvision", "FRAGMENT")
    for schema in _SCHEMAS:
        name = schema.partition("(")[0]
        if not hasattr(torch.ops.torchvision, name):
            library.define(schema)
    _LIBRARIES.append(library)
    return try_import("torchvision")


def import_timm() -> tuple[ModuleType | None, str | None]:
    """Return (timm, None), or (None, the sentence that says why timm cannot be imported)."""
    if importlib.util.find_spec("timm") is None:
        return None, "timm is not installed"
    reason = repair_torchvision()
    if reason is not None:
        return None, f"timm needs torchvision, and {reason}"
    reason = try_import("timm")
    return (None, reason) if reason else (sys.modules["timm"], None)


def why_absent(modules: Sequence[str], install: str) -> str | None:
    """Why a package cannot be used, in one sentence with the command that would help, or None when all can be imported.

    None of them is imported when one is missing.
    """
    absent = [name for name in modules if not _is_there(name)]
    if absent:
        return f"{', '.join(absent)} is not installed:  {install}"
    return next((reason for name in modules if (reason := _why_not_imported(name)) is not None), None)


def _is_there(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # the package that it is a part of
        return False


@functools.cache
def _why_not_imported(module: str) -> str | None:
    reason = try_import(module)
    if reason is None:
        return None
    try:
        version = importlib.metadata.version(module.partition(".")[0])
    except importlib.metadata.PackageNotFoundError:
        version = "of unknown version"
    return f"{reason} ({module} {version}, torch {torch.__version__})"


def try_import(name: str) -> str | None:
    try:
        importlib.import_module(name)
    except Exception as error:  # a broken binary wheel raises anything: OSError, RuntimeError, AttributeError
        first_line = (str(error).splitlines() or [""])[0]
        return f"importing {name} failed: {type(error).__name__}: {first_line}"
    return None


def _forget(package: str) -> None:
    for name in [name for name in sys.modules if name == package or name.startswith(f"{package}.")]:
        del sys.modules[name]


@dataclass(frozen=True)
class Baseline:
    """An eager model with random weights, and how its library prepares an image for it."""

    model: torch.nn.Module
    source: str
    why_not_timm: str | None
    crop_pct: float
    mean: tuple[float, ...]
    std: tuple[float, ...]


def baseline(name: str, seed: int, img_size: int | None = None) -> Baseline:
    """Build the eager model called `name` in fp32 on the CPU, in eval mode, with `randomise_`d weights.

    img_size: side of the images it takes, None for its own.

    Raises:
        ValueError: fastvit has no preset of that name.
    """
    import fastvit

    config = fastvit.config.preset(name)
    size = {} if img_size is None else {"img_size": img_size}
    timm, reason = import_timm()
    if timm is not None and not timm.is_model(name):
        timm, reason = None, f"timm {timm.__version__} has no model called {name}"
    if timm is not None:
        model = timm.create_model(name, pretrained=False, num_classes=config.num_classes, **size)
        data = timm.data.resolve_model_data_config(model)
        source = f"timm {timm.__version__}"
        crop_pct, mean, std = data["crop_pct"], tuple(data["mean"]), tuple(data["std"])
    else:
        model = fastvit.create_model(name, **size)
        source = "fastvit reference"
        crop_pct, mean, std = 0.9, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)
    randomise_(model, seed)
    return Baseline(model.eval(), source, reason, crop_pct, mean, std)


@torch.no_grad()
def randomise_(model: torch.nn.Module, seed: int) -> torch.nn.Module:
    """Fill every parameter with seeded random numbers that no kernel can get right by accident.

    A freshly built ViT has LayerNorm weights of one, biases of zero, a zero class token and often a zero head: an
    op that drops any of them would still pass. Matrices keep unit gain, so that activations neither vanish nor grow.
    """
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float32)
        if parameter.ndim in (2, 4) and name.endswith("weight"):
            value = noise * parameter[0].numel() ** -0.5
        elif name.endswith("weight"):
            value = 1 + 0.2 * noise
        elif name.endswith("gamma"):
            value = 0.3 + 0.1 * noise
        else:
            value = 0.2 * noise
        parameter.copy_(value)
    return model
