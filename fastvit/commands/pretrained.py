"""A classifier from a directory as transformers saves it: config.json, preprocessor_config.json, model.safetensors."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .labels import as_labels, read_json
from .models import Loaded, Request
from .terminal import UsageError, as_usage_errors, benchmarks

if TYPE_CHECKING:
    from torch import nn

    from fastvit.config import ViTConfig
    from fastvit.images import Preprocessing

# transformers' name of an activation -> ours
_ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "quick_gelu": "quick_gelu",
}
_ANY_SIZE = ("dinov2", "dinov2_with_registers", "dinov3_vit")  # their positions follow the image


def load(asked: Request, directory: Path, classifier: bool) -> Loaded:
    """The model of the directory: a fastvit.VisionTransformer where it is one, else transformers' own, accelerated.

    Raises:
        UsageError: a file is missing or wrong, or the model classifies nothing and a ``classifier`` is wanted.
    """
    import torch

    config = read_json(directory / "config.json")
    if not isinstance(config, dict) or not isinstance(config.get("model_type"), str):
        raise UsageError(f"{directory / 'config.json'}: expected an object with a model_type")
    kind, names = config["model_type"], config.get("architectures") or ()
    headed = any("ForImageClassification" in str(name) for name in names)
    if classifier and not headed:
        raise UsageError(f"{directory}: {', '.join(map(str, names)) or kind} does not classify images")
    tower = config["vision_config"] if isinstance(config.get("vision_config"), dict) else config
    if tower.get("num_channels", 3) != 3:
        raise UsageError(f"{directory}: a model of {tower['num_channels']} channels cannot be shown RGB images")
    prepare = _preprocessing(asked, directory, tower)
    size = prepare.size
    if size is None:
        raise UsageError(f"{directory}: it keeps the proportions of an image; give its side in pixels with --img-size")
    if size != _image_size(tower) and not (asked.img_size and kind == "vit") and kind not in _ANY_SIZE:
        raise UsageError(f"{directory}: its images are prepared as {size}, but the model takes {_image_size(tower)}")
    labels = as_labels(config["id2label"], directory / "config.json") if "id2label" in config else None
    ours = vit_config(config, size) if headed else None
    if ours is not None and size[0] % tower.get("patch_size", 16):
        raise UsageError(f"img-size {size[0]} is not divisible by the patches of {directory}, {tower['patch_size']}")
    model: Any = _ours(ours, directory) if ours is not None else _theirs(directory, headed)
    return Loaded(
        name=directory.resolve().name,
        model=model,
        keyword="" if ours is not None else "pixel_values",
        prepare=prepare,
        num_classes=0 if not headed else ours.num_classes if ours is not None else model.config.num_labels,
        labels=labels,
        device=torch.device("cpu"),
        dtype=torch.float32,
        backend="auto",
    )


def _image_size(config: dict[str, Any]) -> tuple[int, int]:
    value = config.get("image_size", 224)
    sides = value if isinstance(value, list) and len(value) == 2 else [value, value]
    if not all(isinstance(side, int) and side > 0 for side in sides):
        raise UsageError(f"config.json: image_size must be one or two numbers of pixels, got {value!r}")
    return sides[0], sides[1]


def _preprocessing(asked: Request, directory: Path, config: dict[str, Any]) -> "Preprocessing":
    from fastvit.images import Preprocessing

    path = directory / "preprocessor_config.json"
    if not path.exists() and not (asked.mean and asked.std):
        raise UsageError(f"{path}: no such file; without it --mean and --std must say how images are normalised")
    found = read_json(path) if path.exists() else {"resample": 3}
    height, width = _image_size(config)
    with as_usage_errors(ValueError, TypeError, AttributeError):
        prepare = Preprocessing.of_transformers({"size": {"height": height, "width": width}, **found})
    if asked.crop_pct:
        side = asked.img_size or (prepare.size or (height, width))[0]
        return Preprocessing.of_timm(side, asked.crop_pct, prepare.mean, prepare.std, prepare.resample)
    return prepare.at(asked.img_size) if asked.img_size else prepare


def vit_config(config: dict[str, Any], size: tuple[int, int]) -> "ViTConfig | None":
    """fastvit's options for transformers' configuration of a ViT classifier; None where it is another model."""
    from fastvit.config import ViTConfig

    if config["model_type"] != "vit" or config.get("hidden_act", "gelu") not in _ACTIVATIONS:
        return None
    width = config.get("hidden_size", 768)
    with as_usage_errors(ValueError, TypeError, ZeroDivisionError):
        return ViTConfig(
            img_size=size,
            patch_size=config.get("patch_size", 16),
            num_classes=len(config["id2label"]) if "id2label" in config else config.get("num_labels", 2),
            embed_dim=width,
            depth=config.get("num_hidden_layers", 12),
            num_heads=config.get("num_attention_heads", 12),
            mlp_ratio=(config.get("intermediate_size", 3072) + 0.5) / width,  # rounded down to that size again
            qkv_bias=config.get("qkv_bias", True),
            act_layer=_ACTIVATIONS[config.get("hidden_act", "gelu")],
            norm_eps=config.get("layer_norm_eps", 1e-12),
            weight_init="skip",
        )


def _ours(config: "ViTConfig", directory: Path) -> "nn.Module":
    import fastvit

    with as_usage_errors(ValueError, TypeError, RuntimeError, ImportError, OSError):
        model = fastvit.VisionTransformer(config)
        fastvit.load_checkpoint(model, directory)
    return model


@contextmanager
def _silent(logging: Any) -> Iterator[None]:
    """No bar and no report of transformers' on stderr: what is wrong is said in one line."""
    bar, level = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity(logging.CRITICAL)
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bar:
            logging.enable_progress_bar()


def _theirs(directory: Path, headed: bool) -> Any:
    import fastvit

    try:
        import transformers
    except ImportError:
        raise UsageError(f"{directory}: this model needs transformers:  pip install transformers") from None
    benchmarks("peers").repair_torchvision()  # transformers imports the torchvision it finds, even one that is broken
    options = {"local_files_only": True, "use_safetensors": True, "trust_remote_code": False}
    auto = transformers.AutoModelForImageClassification if headed else transformers.AutoModel
    with _silent(transformers.utils.logging):
        try:
            model, told = auto.from_pretrained(directory, output_loading_info=True, **options)
        except Exception as error:  # safetensors, json and every configuration class have errors of their own
            raise UsageError(f"{directory}: transformers: {(str(error).splitlines() or [repr(error)])[0]}") from None
    unused = ("mask_token",) if headed else ("mask_token", "pooler.dense.weight", "pooler.dense.bias")
    absent = sorted(name for name in told["missing_keys"] if not name.endswith(unused))
    if absent:
        raise UsageError(f"{directory}: {len(absent)} parameters are not in the checkpoint, {absent[0]} for one")
    tower = model if headed else getattr(model, "vision_model", model)
    try:
        return fastvit.accelerate(tower)
    except ValueError:  # a model that fastvit knows nothing about runs as it is
        return tower
