"""What is said first of many rows: the cases a reader asks for, in sentences and in few lines."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

from . import table
from .cases import FORWARD, MODEL_DTYPES, TRAINING
from .standings import Standing, median, number, provider

Row = Mapping[str, object]
Rank = Callable[[Standing], tuple]

MODEL_LINES, OP_LINES, HEADLINES = 16, 12, 4

# The models that people run most, then the others as they come.
_MODELS = ("vit_base_patch16_224", "vit_large_patch16_224", "vit_small_patch16_224")
_WIDTH, _TOKENS = 768, (196, 197)  # ViT-B at 224 pixels

# Which whole models are shown: of each kind at most so many; what a kind leaves goes to the next by rank.
_KINDS: tuple[tuple[Callable[[Standing], bool], int], ...] = (
    (lambda s: s.direction == FORWARD and s.pixels == "224 px", 10),
    (lambda s: s.direction == TRAINING, 4),
    (lambda s: s.direction == FORWARD and s.pixels != "224 px", 2),
)
_OP_KINDS: tuple[tuple[Callable[[Standing], bool], int], ...] = (
    (lambda s: s.direction == FORWARD, 9),
    (lambda s: s.direction != FORWARD, 3),
)


def models(found: Sequence[Standing], most: int = MODEL_LINES) -> list[Standing]:
    """The whole models to show: known ones, at the smallest and the largest batch of each dtype and size."""
    return _chosen([s for s in found if not s.is_op], _KINDS, _model_rank(found), most)


def ops(found: Sequence[Standing], most: int = OP_LINES) -> list[Standing]:
    """The ops to show: each once in a direction, as ViT-B calls it, at the largest batch."""
    ranked = sorted((s for s in found if s.is_op), key=_op_rank)
    first = {(s.subject, s.direction): s for s in reversed(ranked)}
    return _chosen([s for s in found if s in first.values()], _OP_KINDS, _op_rank, most)


def _chosen(
    found: Sequence[Standing], kinds: Sequence[tuple[Callable[[Standing], bool], int]], rank: Rank, most: int
) -> list[Standing]:
    ranked = sorted(found, key=rank)
    kept = [s for kind, share in kinds for s in list(filter(kind, ranked))[:share]][:most]
    kept += [s for s in ranked if s not in kept][: most - len(kept)]
    return [s for s in found if s in kept]


def _model_rank(found: Sequence[Standing]) -> Rank:
    batches: dict[tuple, list[int]] = {}
    for s in found:
        batches.setdefault(_line(s), []).append(s.batch)

    def rank(s: Standing) -> tuple:
        case, line = str(s.first["case"]), batches[_line(s)]
        inner = s.batch not in (min(line), max(line))
        known = _MODELS.index(case) if case in _MODELS else len(_MODELS)
        return inner, known, _dtype(s), s.batch

    return rank


def _line(s: Standing) -> tuple:
    return s.is_op, s.subject, s.dtype, s.direction, s.dimensions[1:]


def _op_rank(s: Standing) -> tuple:
    return s.width != _WIDTH, s.tokens not in _TOKENS, _dtype(s), -s.batch


def _dtype(s: Standing) -> int:
    return MODEL_DTYPES.index(s.dtype) if s.dtype in MODEL_DTYPES else len(MODEL_DTYPES)


def headlines(found: Sequence[Standing], most: int = HEADLINES) -> list[str]:
    """A sentence per case: "ViT-B/16, batch 1, float32: 2.55x eager, 1.08x the best peer (OpenVINO)"."""
    return [f"{s.title}: {verdict(s)}" for s in models(found, most)]


def verdict(s: Standing) -> str:
    """The two ratios in words, or that the run failed."""
    if s.against_eager is None:
        return str(s.ours["status"]) if s.ours and s.ours["status"] != "ok" else "no ratio measured"
    words = f"{s.against_eager:.2f}x eager"
    if s.against_peer is None or s.peer is None:
        return words
    return f"{words}, {s.against_peer:.2f}x the best peer ({provider(s.peer)})"


def overall(found: Sequence[Standing], what: str) -> str:
    """How many of all cases are ahead of eager and of the best other, and by how much in the middle."""
    eager = [ratio for s in found if (ratio := s.against_eager)]
    peers = [ratio for s in found if (ratio := s.against_peer)]
    if not eager:
        return f"{what}: no ratio measured"
    ahead = sum(ratio > 1 for ratio in eager)
    words = f"{what}: faster than eager in {ahead} of {len(eager)} cases (median {median(eager):.2f}x)"
    if not peers:
        return words
    ahead = sum(ratio > 1 for ratio in peers)
    return f"{words}, than the best other in {ahead} of {len(peers)} (median {median(peers):.2f}x)"


def notes(rows: Iterable[Row]) -> list[str]:
    """What sound runs said of themselves, whether they can be trusted, and what they were made with; each once."""
    sound = [row for row in rows if row["status"] == "ok"]
    said = [f"{provider(row)}: {row['note']}" for row in sound if row.get("note")]
    return list(dict.fromkeys([*said, *table.footnotes([{**row, "note": ""} for row in sound], {})]))


def cell(value: float | None, digits: str, unit: str = "") -> str:
    """A number as tables show it, "-" where there is none."""
    return "-" if value is None else format(value, digits) + unit


def milliseconds(value: float | None) -> str:
    """Three digits: 0.123, 12.3, 1,234."""
    if value is None:
        return "-"
    digits = next((digits for below, digits in ((1, ".3f"), (10, ".2f"), (1000, ".1f")) if value < below), ",.0f")
    return format(value, digits)


def ours_ms(s: Standing) -> str:
    """fastvit's time, or the status of a run that has none."""
    if s.ours is not None and s.ours["status"] != "ok":
        return str(s.ours["status"])
    return milliseconds(number(s.ours, "median_ms"))
