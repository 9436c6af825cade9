"""The compatibility table: the rows that tests/compatibility.py measured, and the README's section made of them."""

import csv
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

# what keeps working on an accelerated model, in the order of the table's columns
CHECKS = ("eval fp32", "bf16", "training step", "compile", "export", "ONNX", "state_dict", "restore")
COLUMNS = (
    "library",
    "model",
    "fused",
    "parts",
    "blocks",
    *CHECKS,
    "eager",
    *("date", "device", "fastvit", "torch", "timm", "transformers", "torchvision", "python", "commit"),
)
PATH = Path(__file__).resolve().parent / "results" / "compatibility.csv"

# how an entry that is no ratio begins; what follows it becomes a footnote
SAME, LIBRARY, FAILED, ABSENT = "same", "library", "FAILED", "absent"

LEGEND = (
    "Numbers: the largest error against the untouched model in float64, in units of the untouched model's own in the "
    "same dtype, over all outputs; of the training step over all parameters' gradients, of compile over both. Whatever "
    "breaks the tolerance rule is FAILED, never a number.",
    "fused: encoder blocks that run as a whole, of all that the model has, text towers and decoders included; "
    "+ n in parts: of n more the attention, MLP or norms.",
    "compile: `torch.compile(fullgraph=True)`, forward and backward. export: `torch.export`, saved and loaded; and "
    "again with the reference backend, whose graph may hold PyTorch's own ops alone. ONNX: run by "
    "ONNX Runtime.",
    "`=`: the same bits. state_dict: same keys, strict loading both ways, `save_pretrained`. restore: same outputs, "
    "nothing left in any module.",
)

Row = Mapping[str, str]


def read(path: Path = PATH) -> list[dict[str, str]]:
    """The rows of a CSV file; a file that does not exist has none."""
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def write(rows: Iterable[Row], path: Path = PATH) -> None:
    """Replace a CSV file; a run that is interrupted leaves the old one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.new")
    with temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    temporary.replace(path)


def failures(rows: Iterable[Row]) -> list[str]:
    """One line for each entry of the table that is a failure."""
    return [
        f"{row['library']} {row['model']}: {check}: {row[check].removeprefix(FAILED).strip()}"
        for row in rows
        for check in CHECKS
        if row[check].startswith(FAILED)
    ]


def section(rows: Sequence[Row]) -> str:
    """The Markdown between the markers: the table, its footnotes, and what it was measured with."""
    if not rows:
        return "Not measured yet: `make compatibility`.\n"
    notes: dict[str, int] = {}

    def mark(note: str) -> str:
        return f" ({notes.setdefault(note, len(notes) + 1)})" if note else ""

    lines = [_line(["library", "model", "fused", *CHECKS]), _line(["---", "---", *["---:"] * (1 + len(CHECKS))])]
    for row in rows:
        parts = f" + {row['parts']} in parts" if row["parts"] != "0" else ""
        fused = f"{row['fused']}/{row['blocks']}{parts}{mark(row['eager'])}"
        lines.append(_line([row["library"], row["model"], fused, *(_entry(row[check], mark) for check in CHECKS)]))
    first = rows[0]
    versions = ", ".join(f"{name} {first[name]}" for name in ("torch", "timm", "transformers", "torchvision"))
    footnotes = [f"({number}) {note}" for note, number in notes.items()]
    ours = f"fastvit {first['fastvit']} ({first['commit']})"
    made = f"{len(rows)} models of two blocks with random weights; {versions}; {ours}; {first['device']}"
    return "\n".join([*lines, "", *(f"- {note}" for note in (*LEGEND, *footnotes, made)), ""])


def _entry(value: str, mark: Callable[[str], str]) -> str:
    word, _, rest = value.partition(" ")
    if word == SAME:
        return "="
    if word == ABSENT:
        return "-" + mark(rest)
    if word == LIBRARY:
        return "-" + mark(f"nor does the untouched model: {rest}")
    if word == FAILED:
        return FAILED + mark(rest)
    return f"{float(word):.2f}x"


def _line(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cells) + " |"
