"""Rows of one case side by side: eager, fastvit, the best of the others, and what a reader calls all of them."""

from __future__ import annotations

import re
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TypeVar

from .cases import MODEL_DTYPES
from .rows import MODEL, OP, is_ours

Row = Mapping[str, object]
K = TypeVar("K", bound=Hashable)

EAGER, OURS = "eager", "fastvit"

# How pictures and tables spell a provider; one that is not here is spelt as in its row.
NAMES = {
    "compile": "torch.compile",
    "compile-max-autotune": "compile, tuned",
    "compile-freezing": "compile, frozen",
    "sdpa-flash": "SDPA flash",
    "sdpa-efficient": "SDPA efficient",
    "sdpa-math": "SDPA math",
    "sdpa-cudnn": "SDPA cuDNN",
    "onnxruntime": "ONNX Runtime",
    "openvino-latency": "OpenVINO",
    "openvino-throughput": "OpenVINO streams",
}
_DIRECTIONS = {"forward+backward": "fwd+bwd"}  # where a title has no room
_SIZES = {"tiny": "Ti", "small": "S", "base": "B", "large": "L", "huge": "H", "giant": "g"}


def number(row: Row | None, column: str) -> float | None:
    """A cell as a number, None where it is empty or there is no row."""
    value = None if row is None else row.get(column)
    return None if value in (None, "") else float(str(value))


def is_sound(row: Row | None) -> bool:
    """Whether a row passed its check and was timed."""
    return row is not None and row["status"] == "ok" and bool(number(row, "median_ms"))


def provider(row: Row) -> str:
    """A provider as a reader calls it."""
    return NAMES.get(str(row["provider"]), str(row["provider"]))


@dataclass(frozen=True)
class Standing:
    """All rows of one device, case, shape, dtype and direction."""

    rows: tuple[Row, ...]

    @property
    def first(self) -> Row:
        return self.rows[0]

    @property
    def is_op(self) -> bool:
        return (self.first.get("level") or MODEL) == OP

    @property
    def direction(self) -> str:
        return str(self.first.get("direction") or "forward")

    @property
    def dtype(self) -> str:
        return str(self.first["dtype"])

    @cached_property
    def dimensions(self) -> tuple[int, ...]:
        """The shape's numbers."""
        return tuple(int(part) for part in str(self.first["shape"]).split("x"))

    @property
    def batch(self) -> int:
        return self.dimensions[0]

    @property
    def tokens(self) -> int:
        """N of an op; the patches of an image for patch_embed, the positions of group_norm's maps."""
        _, *rest = self.dimensions
        if self.first["case"] == "attention":
            return rest[1]
        if self.first["case"] == "patch_embed":
            _, height, width, patch, *_ = rest
            return (height // patch) * (width // patch)
        if self.first["case"] == "group_norm":
            return rest[1] * rest[2]
        return rest[0]

    @property
    def width(self) -> int:
        """D of an op, the channels of group_norm."""
        _, *rest = self.dimensions
        if self.first["case"] == "attention":
            return rest[0] * rest[2]
        if self.first["case"] == "group_norm":
            return rest[0]
        return rest[-1] if self.first["case"] in ("patch_embed", "linear_fc2") else rest[1]

    @property
    def pixels(self) -> str:
        """A model's image: "224 px"."""
        height, width = self.dimensions[-2:]
        return f"{height} px" if height == width else f"{height} × {width} px"

    @property
    def subject(self) -> str:
        """The model or the op: ViT-B/16 for vit_base_patch16_224, R50+ViT-B/16 for a hybrid, others by their names."""
        name = str(self.first["case"])
        found = re.fullmatch(rf"vit_({'|'.join(_SIZES)})_(?:r(\d+)_s|patch)(\d+)_\d+", name)
        if not found:
            return name
        size, resnet, patch = found.groups()
        return f"{f'R{resnet}+' if resnet else ''}ViT-{_SIZES[size]}/{patch}"

    @property
    def size(self) -> str:
        """What sets two cases of one subject, batch, dtype and direction apart."""
        return f"{self.tokens} × {self.width}" if self.is_op else self.pixels

    @property
    def name(self) -> str:
        """The subject, of models with the size of their images where that is not the usual one."""
        return self.subject if self.is_op or self.pixels == "224 px" else f"{self.subject} {self.pixels}"

    def heading(self, *parts: str) -> str:
        """These words, and the direction where it is not forward."""
        direction = _DIRECTIONS.get(self.direction, self.direction)
        return ", ".join([*parts, *([] if self.direction == "forward" else [direction])])

    @property
    def title(self) -> str:
        """The whole case in one line; what is usual (forward, 224 px) is left out for models."""
        parts = [f"batch {self.batch}", self.dtype]
        return self.heading(f"{self.subject} {self.size}" if self.is_op else self.name, *parts)

    def of(self, name: str) -> Row | None:
        """The row of that provider."""
        return next((row for row in self.rows if row["provider"] == name), None)

    @property
    def eager(self) -> Row | None:
        return self.of(EAGER)

    @cached_property
    def ours(self) -> Row | None:
        """fastvit as a user gets it; where that was not measured, the fastest of its backends, then any."""
        own = [row for row in self.rows if is_ours(row["provider"])]
        return self.of(OURS) or max(filter(is_sound, own), key=self._speed, default=next(iter(own), None))

    @cached_property
    def peers(self) -> list[Row]:
        """Who is neither eager nor fastvit and has a speed, fastest first."""
        others = [row for row in self.rows if row["provider"] != EAGER and not is_ours(row["provider"])]
        return sorted(filter(is_sound, others), key=self._speed, reverse=True)

    @property
    def peer(self) -> Row | None:
        """The best that a reader could have instead."""
        return next(iter(self.peers), None)

    @property
    def failed(self) -> list[Row]:
        return [row for row in self.rows if row["status"] != "ok"]

    def ratio(self, row: Row | None) -> float | None:
        """Speed as a multiple of eager's, None for a row that has no speed."""
        if row is None or not is_sound(row):
            return None
        eager, own = number(self.eager, "median_ms"), number(row, "median_ms")
        return number(row, "ratio") or (eager / own if eager and own else None)

    @property
    def against_eager(self) -> float | None:
        return self.ratio(self.ours)

    @property
    def against_peer(self) -> float | None:
        """fastvit's speed as a multiple of the best other's; by way of eager, whom both were timed against."""
        if not is_sound(self.ours) or self.peer is None:
            return None
        ours, theirs = self.ratio(self.ours), self.ratio(self.peer)
        if ours and theirs:
            return ours / theirs
        return (number(self.peer, "median_ms") or 0.0) / (number(self.ours, "median_ms") or 1.0)

    def _speed(self, row: Row) -> tuple[float, float]:
        return self.ratio(row) or 0.0, -(number(row, "median_ms") or 0.0)


def standings(rows: Iterable[Row]) -> list[Standing]:
    """Rows by case, in the order in which the cases first come; eager first, then as they come."""
    groups: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        name = tuple(
            str(row.get(column) or "") for column in ("device", "level", "case", "shape", "dtype", "direction")
        )
        groups.setdefault(name, []).append(row)
    return [Standing(tuple(sorted(group, key=lambda row: row["provider"] != EAGER))) for group in groups.values()]


def order(row: Row) -> tuple[object, ...]:
    """To sort rows by: models as their work grows, dtypes as they are listed, not by their letters."""
    dtype, case, level = str(row["dtype"]), str(row["case"]), str(row.get("level") or MODEL)
    listed = MODEL_DTYPES.index(dtype) if dtype in MODEL_DTYPES else len(MODEL_DTYPES)
    shape = tuple(int(part) if part.isdigit() else 0 for part in str(row["shape"]).split("x"))
    work = float(str(row.get("flops") or 0))
    place = (case, shape, work) if level == OP else (shape[:1], work, case, shape)
    return (str(row["device"]), level, str(row.get("direction") or ""), listed, *place, str(row["provider"]))


def grouped(found: Iterable[Standing], name: Callable[[Standing], K]) -> dict[K, list[Standing]]:
    """Standings by what the function says of them, in the order they come."""
    groups: dict[K, list[Standing]] = {}
    for standing in found:
        groups.setdefault(name(standing), []).append(standing)
    return groups


def devices(rows: Iterable[Row]) -> dict[str, list[Row]]:
    """Rows by device, devices by name."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(str(row["device"]), []).append(row)
    return dict(sorted(found.items()))


def median(values: Sequence[float]) -> float | None:
    """The middle, None of nothing."""
    ordered = sorted(values)
    middle = len(ordered) // 2
    if not ordered:
        return None
    return ordered[middle] if len(ordered) % 2 else (ordered[middle - 1] + ordered[middle]) / 2


def ceilings(rows: Iterable[Row]) -> tuple[float | None, float | None]:
    """(GFLOP/s, GB/s): the medians of what the rows' runs measured as this machine's own rates."""
    rows = list(rows)
    gflops, gbs = (
        [value for row in rows if (value := number(row, name))] for name in ("ceiling_gflops", "ceiling_gbs")
    )
    return median(gflops), median(gbs)
