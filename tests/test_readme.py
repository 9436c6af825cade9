"""The README's generated sections are what the committed rows say, and so are the pictures beside the rows."""

import shutil
from pathlib import Path

import example_rows
import pytest

from fastvit.benchmarks import plot, readme, rows, summary

MARKED = "above\n<!-- bench:begin -->\nold\n<!-- bench:end -->\nbelow\n"


def lines(text: str, start: str = "| ViT") -> list[str]:
    return [line for line in text.splitlines() if line.startswith(start)]


def test_the_readme_and_the_pictures_are_what_the_rows_say(capsys: pytest.CaptureFixture[str]) -> None:
    code = readme.main(["--check"])
    assert code == 0, capsys.readouterr().err


@pytest.fixture
def copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A repository of a README and results, up to date."""
    folder = tmp_path / readme.FOLDER
    for path in ("README.md", "benchmarks/results/compatibility.csv"):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(readme.ROOT / path, tmp_path / path)
    rows.write(folder / "a-chip-2-threads.csv", example_rows.models(batches=(8,), dtypes=("float32",)))
    plot.draw_all(rows.read_folder(folder), folder)
    monkeypatch.setattr(readme, "ROOT", tmp_path)
    assert readme.main([]) == 0
    assert readme.main(["--check"]) == 0
    return tmp_path


def test_a_changed_row_is_noticed(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = copy / readme.FOLDER / "a-chip-2-threads.csv"
    rows.write(path, [{**rows.read(path)[4], "ratio": "3.5"}])
    assert readme.main(["--check"]) == 1
    said = capsys.readouterr().err
    assert "README.md: a table" in said and "a-chip-2-threads-summary.png was drawn from other rows" in said


def test_a_changed_table_is_noticed(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = copy / "README.md"
    path.write_text(path.read_text().replace("2.00x", "2.01x"))
    assert readme.main(["--check"]) == 1
    assert capsys.readouterr().err == "README.md: a table is not what its rows say: run `make readme`\n"
    assert readme.main([]) == readme.main(["--check"]) == 0


def test_a_changed_picture_is_noticed(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = copy / readme.FOLDER
    shutil.copy(folder / "a-chip-2-threads-memory.png", folder / "a-chip-2-threads-models.png")
    assert readme.main(["--check"]) == 1
    assert "a-chip-2-threads-models.png was drawn from other rows" in capsys.readouterr().err


def test_a_line_says_a_case_and_a_failure_its_reason() -> None:
    found = example_rows.models(batches=(1,), dtypes=("float32",))
    text = readme.render(MARKED, found)
    assert "old" not in text and text.startswith("above") and text.endswith("below\n")
    assert readme.render(text, found) == text
    assert lines(text)[0].startswith("| ViT-S/16, batch 1, float32 | ")
    assert "| 2.00x | ONNX Runtime | 1.25x |" in lines(text)[0]
    assert "fastvit-cpu" not in text
    assert text.count("- FAILED: compile, ViT-") == 2
    assert "(benchmarks/results/a-chip-2-threads-summary.png)" in text
    wrong = [{**row, "median_ms": "", "ratio": "", "status": "FAILED"} for row in found if row["provider"] == "fastvit"]
    failed = lines(readme.section(rows.merge(found, wrong)))[0]
    assert "| FAILED | - |" in failed and "2.00x" not in failed
    with pytest.raises(ValueError, match="found 0"):
        readme.render("no markers", [])


def test_the_best_peer_is_sound_and_the_fastest() -> None:
    found = [row for row in example_rows.models(batches=(1,), dtypes=("float32",)) if row["direction"] == "forward"]
    broken = {**found[2], "provider": "broken", "status": "FAILED", "median_ms": "0.001", "ratio": "99"}
    slow = {**found[2], "provider": "slow", "median_ms": "1e6", "ratio": "0.1"}
    assert "| ONNX Runtime | 1.25x |" in lines(readme.section([*found, broken, slow]))[0]


def test_long_lists_are_cut_and_say_so() -> None:
    names = tuple(f"vit_{size}_patch16_224" for size in ("tiny", "small", "base", "large"))
    many = [*example_rows.models(names, (1, 8, 64)), *example_rows.ops()]
    text = readme.section(many)
    assert len(lines(text)) == summary.MODEL_LINES
    assert (
        len([line for line in text.splitlines() if ", batch 8, float32 |" in line and "×" in line]) <= summary.OP_LINES
    )
    assert f"{summary.MODEL_LINES} of 48 cases of models and 10 of 52 cases of ops" in text
    shown = " ".join(lines(text))
    assert "ViT-B/16, batch 1," in shown and "ViT-B/16, batch 64," in shown and "training" in shown
    assert "batch 8" not in shown
