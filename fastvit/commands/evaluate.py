"""`fastvit evaluate`: top-1 and top-5 of a classifier, or how good its frozen features are."""

import json as json_module
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from . import models
from .terminal import (
    Json,
    UsageError,
    as_usage_errors,
    backend_names,
    checked_name,
    printable,
    progress,
    torch_device,
)

if TYPE_CHECKING:
    import torch


def evaluate(
    weights: Annotated[
        Path,
        typer.Argument(help="A run's directory, a checkpoint in it, weights of any layout, or transformers'."),
    ],
    data: Annotated[str, typer.Argument(help="Labelled images, as for train; their test split is taken.")],
    model: models.ModelName = "",
    weights_only: models.WeightsOnly = False,
    img_size: models.ImgSize = 0,
    linear_probe: Annotated[bool, typer.Option("--linear-probe", help="A linear layer on frozen features.")] = False,
    few_shot: Annotated[int, typer.Option(min=0, help="Least squares on so many images of each class.")] = 0,
    l2: Annotated[float, typer.Option(min=0, help="Regularisation of the two.  [default: 0.001, 0.1]")] = 0.0,
    seed: Annotated[int, typer.Option(min=0, help="Which images --few-shot takes.")] = 0,
    batch_size: Annotated[int, typer.Option(min=1, help="Images in one forward pass.")] = 64,
    workers: models.Workers = None,
    dtype: models.Dtype = "float32",
    device: models.Device = "",
    backend: models.Backend = "",
    json: Json = False,
) -> None:
    """Measure a model on the test images of a place.

    --linear-probe and --few-shot N fit a layer of their own to frozen features of the place's training images, as the
    paper does, and need no head.
    """
    import fastvit
    from fastvit import training
    from fastvit.training.evaluation import device_of

    if linear_probe and few_shot:
        raise UsageError("--linear-probe and --few-shot exclude each other")
    if l2 and not (linear_probe or few_shot):
        raise UsageError("--l2 is for --linear-probe and --few-shot")
    kind = f"{few_shot}-shot" if few_shot else "linear probe" if linear_probe else "classifier"
    way = checked_name(backend, backend_names(), "backend", "auto")
    kinds = (training.TrainingError, ValueError, TypeError, OSError)
    with as_usage_errors(*kinds):
        classify, size, network = _opened(
            weights,
            models.Request(
                model=model,
                checkpoint=weights,
                weights_only=weights_only,
                img_size=img_size,
                dtype=dtype,
                device=device,
                backend=backend,
            ),
            kind == "classifier",
        )
        options: dict[str, Any] = {"batch_size": batch_size, "workers": workers, **({"l2": l2} if l2 else {})}
        with fastvit.backend(way), progress(1) as bar:
            if kind != "classifier":
                bar(0, kind, "")
                probe: Any = training.few_shot if few_shot else training.linear_probe
                if few_shot:
                    options |= {"shots": few_shot, "seed": seed}
                found = probe(network, data, data, **options)
            else:
                found = training.evaluate(
                    classify,
                    data,
                    size=size,
                    device=device_of(network),
                    show=lambda done, total: bar(done / total, "evaluating", f"{done}/{total} batches"),
                    **options,
                )
    if json:
        print(json_module.dumps({"weights": str(weights), "data": data, "kind": kind, **asdict(found)}, indent=2))
        return
    for label, value in (
        ("weights", printable(weights)),
        ("kind", kind),
        ("images", found.images),
        ("loss", f"{found.loss:.4f}"),
        ("top-1", f"{100 * found.top1:.2f} %"),
        ("top-5", f"{100 * found.top5:.2f} %"),
    ):
        print(f"{label:<9} {value}")


def _opened(
    weights: Path, asked: models.Request, classifier: bool
) -> "tuple[Callable[[torch.Tensor], torch.Tensor], tuple[int, int], torch.nn.Module]":
    """uint8 images to logits, the images' (height, width), and the model itself, whose features may be wanted."""
    from fastvit import VisionTransformer, training
    from fastvit.training.evaluation import size_of
    from fastvit.training.trained import is_run

    if is_run(weights):
        if asked.model or asked.weights_only:
            raise UsageError(f"{weights}: its config.json says which model it is; leave out --model and --weights-only")
        place = torch_device(asked.device)
        dtype = models.torch_dtype(asked.dtype)
        network = training.load_run(weights)
        if asked.img_size:
            network.set_input_size(asked.img_size)
        network = network.to(place, dtype)
        return network, size_of(network), network
    loaded = models.load(asked, classifier=classifier)
    size, mean, std = loaded.prepare.size, loaded.prepare.mean, loaded.prepare.std
    if size is None:
        raise UsageError(f"{weights}: it keeps the proportions of an image; give its side in pixels with --img-size")
    if isinstance(loaded.model, VisionTransformer):
        loaded.model.patch_embed.mean, loaded.model.patch_embed.std = mean, std
        return loaded.model, size, loaded.model
    if not classifier:
        raise UsageError(f"{weights}: features are probed of fastvit's own models alone, this is transformers'")

    def classify(images: "torch.Tensor") -> "torch.Tensor":
        centre, spread = (images.new_tensor(n, dtype=loaded.dtype).view(-1, 1, 1) for n in (mean, std))
        return loaded.logits((images.to(loaded.dtype) / 255 - centre) / spread)

    return classify, size, loaded.model
