"""`fastvit embed`: the features of a large set of images, as a parquet data set that a killed run goes on with."""

import contextlib
import json as json_module
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from . import models
from .features import POOLS, WHAT, extractor
from .parts import UNREADABLE, Parts, check_folder, digest_of_names, digest_of_weights, start
from .ranks import Ranks, started
from .terminal import Json, UsageError, as_usage_errors, checked_name, printable, progress

if TYPE_CHECKING:
    from torch import Tensor

_MOST_WORKERS = 16
FEATURE_DTYPES = ("float32", "float16")


@models.with_model_options
def embed(
    sources: Annotated[list[str], typer.Argument(metavar="SRC", help="Files, directories (walked), glob patterns.")],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="OUT", help="A folder of parquet files.")],
    what: Annotated[str, typer.Option(help="features, before the head, or logits.")] = "features",
    pool: Annotated[str, typer.Option(help="Of features: own, token (class token) or avg (of patches).")] = "own",
    feature_dtype: Annotated[str, typer.Option(help="In the files: float32 or float16.")] = "float32",
    shard: Annotated[int, typer.Option(min=1, help="Images in one file.")] = 10_000,
    batch_size: Annotated[int, typer.Option(min=1, help="Images in one forward pass.")] = 32,
    workers: Annotated[int | None, typer.Option(min=0, help="To decode; 0: none.  [default: half the cores]")] = None,
    json: Json = False,
    asked: models.Request = models.OWN_CHOICE,
) -> None:
    """Write the features of many images to a folder that pandas.read_parquet reads as one table.

    A run that was killed goes on where it stopped. Under torchrun every process takes its share of the files. An image
    that cannot be read is named on stderr and in OUT/_unreadable, the others are kept, and the exit code is 1.
    """
    asked_for = checked_name(what, WHAT, "what", WHAT[0])
    pooling = checked_name(pool, POOLS, "pool", POOLS[0])
    stored = checked_name(feature_dtype, FEATURE_DTYPES, "feature-dtype", FEATURE_DTYPES[0])
    check_folder(output)
    with started() as ranks:
        loaded = models.load(asked, classifier=False)
        embedded = _Embedded(loaded, extractor(loaded, asked_for, pooling), stored)
        width = embedded.width()
        manifest = {
            "model": loaded.name,
            "weights sha256": digest_of_weights(asked.checkpoint) if ranks.rank == 0 else "",
            "what": asked_for,
            "pool": pooling,
            "width": width,
            "dtype": str(loaded.dtype).removeprefix("torch."),
            "feature dtype": stored,
            "preparation": asdict(loaded.prepare),
            "shard": shard,
        }
        files = ranks.from_first(lambda: _begin(sources, output, manifest))
        parts = Parts(output, len(files), shard, width, stored)
        if workers is None:
            from fastvit.data.batches import half_of_the_cores

            workers = min(_MOST_WORKERS, half_of_the_cores(ranks.world))
        found = _run(embedded, parts, files, ranks, batch_size, workers)
        images, failed = ranks.sums(*found)
        _tell(output, loaded.name, parts, images, failed, json, ranks)


def _begin(sources: Sequence[str], output: Path, manifest: dict[str, Any]) -> list[str]:
    """The images, which the folder's manifest pins, too."""
    from fastvit.images import ImageError, find_images

    files = []
    for found in find_images(sources, recursive=True):
        if isinstance(found, ImageError):
            raise UsageError(str(found))
        files.append(str(found))
    pinned = {"images": len(files), "names sha256": digest_of_names(files)}
    start(output, {**manifest, **pinned})
    return files


@dataclass(frozen=True)
class _Embedded:
    """What an image becomes: by which model, of which of its outputs, stored how."""

    loaded: models.Loaded
    extract: "Callable[[Tensor], Tensor]"
    stored: str

    def __call__(self, pixels: "Tensor") -> "Tensor":
        """uint8 (B, 3, height, width) to (B, D) on the CPU, as it is stored."""
        import torch

        import fastvit

        refusals = as_usage_errors(fastvit.BackendError, torch.OutOfMemoryError)
        with refusals, torch.inference_mode(), fastvit.backend(self.loaded.backend):
            x = self.loaded.prepare.normalised(pixels.to(self.loaded.device, non_blocking=True))
            return self.extract(x).to(getattr(torch, self.stored)).cpu()

    def width(self) -> int:
        """D, by a black image: what cannot run fails before an image is read."""
        import torch

        size = self.loaded.prepare.size
        if size is None:
            raise UsageError(f"{self.loaded.name}: images of one size are needed; say --img-size")
        shape = self(torch.zeros(1, 3, *size, dtype=torch.uint8)).shape
        if len(shape) != 2:
            raise UsageError(f"{self.loaded.name}: its features are {tuple(shape[1:])} and not one row; see --pool")
        return shape[1]


@dataclass
class _Part:
    """A part on its way: what is known of its images so far."""

    names: list[str] = field(default_factory=list)
    features: "list[Tensor]" = field(default_factory=list)
    unreadable: list[tuple[str, str]] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.names) + len(self.unreadable)


def _run(
    embedded: _Embedded, parts: Parts, files: Sequence[str], ranks: Ranks, batch_size: int, workers: int
) -> tuple[int, int]:
    """Write the parts of this process that are missing; how many images its parts have, and how many failed."""
    import torch

    from .reading import batches

    own = range(ranks.rank, len(parts), ranks.world)
    missing = [part for part in own if not parts.path(part).exists()]
    total = sum(len(parts.indices(part)) for part in missing)
    part, done, begun = _Part(), 0, time.monotonic()
    empty = torch.empty(0, parts.width, dtype=getattr(torch, parts.dtype))
    loaded = embedded.loaded
    spans = [(number, parts.indices(number)) for number in missing]
    with progress(total) if ranks.rank == 0 else _silent() as show:
        for number, read in batches(files, spans, loaded.prepare, batch_size, workers, loaded.device.type == "cuda"):
            _add(part, files, read.indices, embedded(read.pixels) if read.indices else empty, read.unreadable)
            done += len(read.indices) + len(read.unreadable)
            if len(part) == len(parts.indices(number)):
                parts.write(number, part.names, torch.cat([empty, *part.features]), part.unreadable)
                part = _Part()
            show(done, f"{done:,}/{total:,} images", _pace(done, total, time.monotonic() - begun))
    return sum(len(parts.indices(number)) for number in own), sum(map(parts.unreadable, own))


def _add(
    part: _Part,
    files: Sequence[str],
    indices: Sequence[int],
    features: "Tensor",
    unreadable: Sequence[tuple[int, str]],
) -> None:
    """A batch; images whose features are no numbers are among those without, and all of these are told."""
    finite = features.isfinite().all(1).tolist()
    failed = [(files[index], why) for index, why in unreadable]
    for index, good in zip(indices, finite, strict=True):
        if good:
            part.names.append(files[index])
        else:
            why = "the features are not finite; --dtype or --feature-dtype float32 may help"
            failed.append((files[index], f"{files[index]}: {why}"))
    part.features.append(features[features.isfinite().all(1)])
    part.unreadable += failed
    for _, why in failed:
        print(f"fastvit: {printable(why)}", file=sys.stderr)


def _pace(done: int, total: int, seconds: float) -> str:
    left = round(seconds * (total - done) / max(done, 1))
    return f"{done / max(seconds, 1e-9):.1f} images/s, {left // 3600}:{left // 60 % 60:02d}:{left % 60:02d} left"


@contextlib.contextmanager
def _silent() -> Iterator[Callable[[float, str, str], None]]:
    yield lambda done, doing, stage: None


def _tell(output: Path, name: str, parts: Parts, images: int, failed: int, json: bool, ranks: Ranks) -> None:
    if ranks.rank == 0:
        facts = {"model": name, "written": str(output), "images": images - failed, "failed": failed}
        if json:
            print(json_module.dumps({**facts, "width": parts.width, "parts": len(parts)}, indent=2))
        else:
            print(f"{printable(output)}: {images - failed:,} images x {parts.width} in {len(parts)} parts")
    if failed and ranks.rank:
        raise typer.Exit(1)
    if failed:
        raise UsageError(f"embed: {failed} of {images} images FAILED, see {printable(output / UNREADABLE)}")
