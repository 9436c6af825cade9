"""The model of a command: by name with its checkpoint, or a directory saved by transformers; and how it sees images."""

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

import typer

from .added_options import Command, with_options
from .terminal import UsageError, as_usage_errors, backend_names, benchmarks, checked_name, torch_device

if TYPE_CHECKING:
    import torch

    from fastvit.images import Preprocessing

DEFAULT_MODEL = "vit_base_patch16_224"
# layout -> crop_pct, resample, mean and std of the library's own checkpoints, where they are not timm's
_TRAINED_ON: dict[str, tuple[float, str, Any, Any]] = {
    "torchvision": (0.875, "bilinear", (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "openai": (1.0, "bicubic", (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),
}

ModelName = Annotated[str, typer.Option(help="Model name.  [default: what the checkpoint fits]")]
Checkpoint = Annotated[
    Path | None, typer.Option(help="Weights: a file of any known layout, or a directory saved by transformers.")
]
RandomWeights = Annotated[bool, typer.Option("--random-weights", help="Do without a checkpoint, to try things out.")]
WeightsOnly = Annotated[
    bool, typer.Option("--weights-only", help="Allow a .pt, .pth or .bin, of which only tensors are unpickled.")
]
ImgSize = Annotated[
    int,
    typer.Option(min=0, max=10_000, show_default=False, help="Side in pixels that the model sees.  [default: its own]"),
]
CropPct = Annotated[
    float, typer.Option(min=0, max=1, show_default=False, help="Share of the shorter side to keep.  [default: timm's]")
]
Mean = Annotated[str, typer.Option(help="Of the channels, in 0..1: one number or R,G,B.  [default: the model's]")]
Std = Annotated[str, typer.Option(help="Likewise.")]
Device = Annotated[str, typer.Option(help="cpu or cuda.  [default: cuda where there is one]")]
Dtype = Annotated[str, typer.Option(help="float32, bfloat16 or float16.")]
Backend = Annotated[str, typer.Option(help="Backend of the ops.  [default: auto]")]
Workers = Annotated[
    int | None,
    typer.Option(min=0, help="Processes that decode images.  [default: half of the cores; none for images in memory]"),
]
NoAccelerate = Annotated[bool, typer.Option("--no-accelerate", help="Plain PyTorch, on the reference backend.")]


@dataclass(frozen=True)
class Request:
    """The options that say which model, as they were given: "", 0, 0.0 and None leave the choice to the model."""

    model: ModelName = ""
    checkpoint: Checkpoint = None
    random_weights: RandomWeights = False
    weights_only: WeightsOnly = False
    img_size: ImgSize = 0
    crop_pct: CropPct = 0.0
    mean: Mean = ""
    std: Std = ""
    device: Device = ""
    dtype: Dtype = "float32"
    backend: Backend = ""
    no_accelerate: NoAccelerate = False


OWN_CHOICE = Request()


def with_model_options(command: Command) -> Command:
    """The command with an option for each field of a request, which reaches it as ``asked``."""
    hints = get_type_hints(Request, include_extras=True)
    added = {field.name: (hints[field.name], field.default) for field in fields(Request)}
    return with_options(command, "asked", added, Request)


def named_or_placed(text: str, checkpoint: Path | None) -> tuple[str, Path | None]:
    """(model, checkpoint) of a command whose first argument is a model's name, a checkpoint's file or its directory.

    Raises:
        UsageError: neither a name nor a place, or a place beside another checkpoint.
    """
    import fastvit

    if text in fastvit.list_models():
        return text, checkpoint
    if not Path(text).exists():
        try:
            checked_name(text, fastvit.list_models(), "model")
        except UsageError as error:
            raise UsageError(f"{error}; nor is there a checkpoint of that name") from None
    if checkpoint is not None:
        raise UsageError(f"{text} and --checkpoint {checkpoint} are two checkpoints: give one of them")
    return "", Path(text)


@dataclass(frozen=True)
class Loaded:
    """A model in eval mode on its device, in its dtype, and what belongs to it.

    keyword: what the model calls its images, "" where they come first and logits (B, K) are returned as they are.
    prepare: an image as it sees it. num_classes: K, 0 without a head. labels: its own,
    if it has any. backend: which ops to run it with.
    """

    name: str
    model: "torch.nn.Module"
    keyword: str
    prepare: "Preprocessing"
    num_classes: int
    labels: list[str] | None
    device: "torch.device"
    dtype: "torch.dtype"
    backend: str

    def inputs(self, pixels: "torch.Tensor") -> "torch.Tensor | dict[str, torch.Tensor]":
        """Images (B, 3, height, width) as the model takes them: alone, or by name."""
        pixels = pixels.to(self.device, self.dtype)
        return {self.keyword: pixels} if self.keyword else pixels

    def logits(self, pixels: "torch.Tensor") -> "torch.Tensor":
        """Images (B, 3, height, width) to logits (B, K)."""
        given = self.inputs(pixels)
        return self.model(**given).logits if isinstance(given, dict) else self.model(given)


def load(asked: Request, classifier: bool = True) -> Loaded:
    """Check the options, then load the model.

    Args:
        classifier: refuse weights without a head.

    Raises:
        UsageError: an option that is wrong, or a checkpoint that does not fit or is refused, with the reason.
    """
    import fastvit
    from fastvit import backends

    from . import pretrained

    directory = _check_source(asked)
    if asked.no_accelerate and asked.backend not in ("", "reference"):
        raise UsageError("--no-accelerate and --backend exclude each other")
    mean, std = channels(asked.mean, "mean"), channels(asked.std, "std")
    name = checked_name(asked.model, fastvit.list_models(), "model")
    dtype = torch_dtype(asked.dtype)
    way = checked_name(asked.backend, backend_names(), "backend", "auto")
    why = backends.why_unavailable(way)
    if why is not None:
        raise UsageError(f"--backend {way}: {why}")
    place = torch_device(asked.device)
    if directory:
        loaded = pretrained.load(asked, directory, classifier)
    else:
        loaded = _of_file(name, asked, classifier)
    return replace(
        loaded,
        model=loaded.model.eval().to(place, dtype),
        prepare=replace(loaded.prepare, mean=mean or loaded.prepare.mean, std=std or loaded.prepare.std),
        device=place,
        dtype=dtype,
        backend="reference" if asked.no_accelerate else way,
    )


def torch_dtype(name: str) -> "torch.dtype":
    """The dtype of that name, float32 for ""."""
    cases = benchmarks("cases")
    return cases.DTYPES[checked_name(cases.ALIASES.get(name, name), list(cases.DTYPES), "dtype", "float32")]


def _check_source(asked: Request) -> Path | None:
    """The directory to load from, if it is one."""
    if asked.checkpoint is None:
        if not asked.random_weights:
            raise UsageError("--checkpoint is missing; --random-weights does without, for answers that mean nothing")
        return None
    if asked.random_weights:
        raise UsageError("--checkpoint and --random-weights exclude each other")
    if not asked.checkpoint.exists():
        raise UsageError(f"{asked.checkpoint}: no such checkpoint")
    if not asked.checkpoint.is_dir():
        return None
    if asked.model:
        raise UsageError(f"{asked.checkpoint}: its config.json says which model it is; leave out --model")
    return asked.checkpoint


def channels(text: str, option: str) -> tuple[float, float, float] | None:
    """A number for each of three channels from "a" or "a,b,c"; None from nothing."""
    if not text:
        return None
    try:
        numbers = [float(part) for part in text.split(",")]
    except ValueError:
        numbers = []
    if len(numbers) not in (1, 3) or not all(abs(n) < 1e3 and (n > 0 or option == "mean") for n in numbers):
        raise UsageError(f"{option} must be one number or three separated by commas, got {text!r}")
    return numbers[0], numbers[-2 % len(numbers)], numbers[-1]


def _of_file(name: str, asked: Request, classifier: bool) -> Loaded:
    """A model by its name, or by the shapes of its checkpoint; with the checkpoint's weights or at random."""
    import torch

    import fastvit
    from fastvit.config import pair, preset
    from fastvit.images import Preprocessing

    tensors, library = _headers(asked.checkpoint, asked.weights_only) if asked.checkpoint else ({}, "")
    if not name:
        name = _preset_of(tensors, str(asked.checkpoint)) if tensors else DEFAULT_MODEL
    config = preset(name)
    own, patch = pair(config.img_size, "img_size")[0], pair(config.patch_size, "patch_size")[0]
    size = asked.img_size or own
    if size % patch:
        raise UsageError(f"img-size {size} is not divisible by the patches of {name}, {patch}")
    if asked.checkpoint is None:
        torch.manual_seed(0)
        model = fastvit.create_model(name, img_size=size)
    else:
        model = fastvit.create_model(name, img_size=size, weight_init="skip", **_head(tensors))
        if classifier and not model.num_classes:
            raise UsageError(f"{asked.checkpoint}: the weights of a model without a head, which does not classify")
        with as_usage_errors(ValueError, OSError, RuntimeError, ImportError):
            fastvit.load_checkpoint(model, asked.checkpoint, weights_only=asked.weights_only or None)
    ours = (0.9 if own <= 224 else 1.0, "bicubic", 0.5, 0.5)  # as timm has it for the checkpoints of these models
    crop_pct, resample, mean, std = _TRAINED_ON.get(library, ours)
    return Loaded(
        name=name,
        model=model,
        keyword="",
        prepare=Preprocessing.of_timm(size, asked.crop_pct or crop_pct, mean, std, resample),
        num_classes=model.num_classes,
        labels=None,
        device=torch.device("cpu"),
        dtype=torch.float32,
        backend="auto",
    )


def _headers(path: Path, weights_only: bool) -> "tuple[Mapping[str, torch.Tensor], str]":
    """What a checkpoint says before it is read: names, as timm spells them, with shapes, and whose layout it is."""
    from fastvit.checkpoints.convert import translate, unwrapped
    from fastvit.checkpoints.files import open_checkpoint

    with as_usage_errors(ValueError, OSError, RuntimeError, ImportError):
        headers = unwrapped(open_checkpoint(path, weights_only or None).headers())
    try:
        found, _, library = translate(headers)
        return found.tensors, library
    except ValueError as error:
        raise UsageError(f"{path}: {str(error).removeprefix('fastvit: ')}") from None


def _preset_of(tensors: "Mapping[str, torch.Tensor]", path: str) -> str:
    """The model of that width, depth, patch and stem, if it can be for images of the size of the position table."""
    from fastvit.config import PRESETS

    width, _, patch, _ = tensors["patch_embed.proj.weight"].shape
    depth = len({name.split(".")[1] for name in tensors if name.startswith("blocks.")})
    shape, stem = (width, depth), _backbone(tensors)
    fitting = [
        n
        for n, c in PRESETS.items()
        if ((c.embed_dim, c.depth), c.backbone, c.patch_size) == (shape, stem, patch * c.backbone_stride)
    ]
    if not fitting:
        raise UsageError(f"{path}: no model is {width} wide and {depth} deep with patches of {patch}; see --model")
    positions = tensors.get("pos_embed")
    rows = {n: math.prod(PRESETS[n].grid_size) + PRESETS[n].prefix_tokens for n in fitting}
    return next((n for n in fitting if positions is not None and rows[n] == positions.shape[1]), fitting[0])


def _backbone(tensors: "Mapping[str, torch.Tensor]") -> tuple[int, ...] | None:
    """The stages of a hybrid's stem, as ViTConfig has them; None where pixels are projected."""
    stem = [name.split(".")[2:] for name in tensors if name.startswith("patch_embed.backbone.")]
    blocks = {(int(parts[1]), int(parts[3])) for parts in stem if parts[0] == "stages"}
    return tuple(Counter(stage for stage, _ in sorted(blocks)).values()) if stem else None


def _head(tensors: "Mapping[str, torch.Tensor]") -> dict[str, Any]:
    """The head of a checkpoint as options of a model: how many classes, and how wide the layer before it."""
    head, before = tensors.get("head.weight"), tensors.get("pre_logits.fc.weight")
    return {
        "num_classes": 0 if head is None else head.shape[0],
        "representation_size": None if before is None else before.shape[0],
    }
