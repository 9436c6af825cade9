"""The pictures of the benchmarks: what is drawn, that no text lies on another, and that each knows its rows."""

import csv
import itertools
from pathlib import Path

import example_rows
import pytest
from matplotlib.text import Text
from PIL import Image

from fastvit.benchmarks import charts, pictures, plot, report, rows, standings

NAMES = ("growth", "memory", "models", "ops", "roofline", "summary")


@pytest.fixture(scope="module")
def everything() -> list[dict]:
    return [*example_rows.models(), *example_rows.ops()]


def svg(panels: list[charts.Panel]) -> str:
    with charts.style():
        return "".join(panel.title + charts.alone(panel) for panel in panels)


def test_every_picture_and_the_report_are_drawn_and_carry_their_digest(everything, tmp_path: Path) -> None:
    written = plot.draw_all(everything, tmp_path / "new")
    assert sorted(path.name for path in written) == [
        *(f"a-chip-2-threads-{name}.png" for name in NAMES),
        "report.html",
    ]
    assert sorted((tmp_path / "new").iterdir()) == sorted(written)
    for path in written[:-1]:
        picture = pictures.PICTURES[path.stem.rsplit("-", 1)[1]]
        with Image.open(path) as image:
            assert image.format == "PNG"
            assert image.height < 6000
            assert image.text[plot.KEYWORD] == plot.digest(picture.source(everything)) == plot.drawn_from(path)
    first = [path.read_bytes() for path in written]
    assert [path.read_bytes() for path in plot.draw_all(everything, tmp_path / "new")] == first
    read_again = tmp_path / "rows.csv"
    rows.write(read_again, everything)
    assert plot.stale(rows.read(read_again), tmp_path / "new") == []


def test_what_is_stale(everything, tmp_path: Path) -> None:
    plot.draw_all(everything, tmp_path)
    changed = [{**everything[0], "median_ms": 123.0}, *everything[1:]]
    said = {fault.split()[0] for fault in plot.stale(changed, tmp_path)}
    assert said == {*(f"a-chip-2-threads-{name}.png" for name in NAMES if name != "ops"), "report.html"}
    more_memory = [{**everything[0], "peak_mib": 123.0}, *everything[1:]]
    assert len(plot.stale(more_memory, tmp_path)) == 2
    assert any("has no rows" in fault for fault in plot.stale(example_rows.models(), tmp_path))
    (tmp_path / "a-chip-2-threads-ops.png").unlink()
    assert plot.stale(everything, tmp_path) == ["a-chip-2-threads-ops.png is missing"]
    (tmp_path / "a-chip-2-threads-ops.png").write_bytes(b"no picture")
    assert plot.stale(everything, tmp_path) == ["a-chip-2-threads-ops.png was drawn from other rows"]
    assert plot.stale([], tmp_path / "nowhere") == []


def test_a_digest_is_of_values_and_not_of_their_order(everything) -> None:
    picture = pictures.PICTURES["models"]
    mixed = [dict(reversed(row.items())) for row in reversed(everything)]
    assert plot.digest(picture.source(mixed)) == plot.digest(picture.source(everything))
    assert plot.digest([{"a": "1"}]) != plot.digest([{"a": "2"}])


def test_a_failed_run_has_no_bar_and_no_ratio(everything) -> None:
    drawn = svg(pictures.PICTURES["ops"].drawn([row for row in everything if row["case"] == "block"]))
    assert drawn.count("FAILED") == 6
    assert "1.50×" not in drawn
    failed = [standing for standing in standings.standings(everything) if standing.failed]
    assert failed
    for standing in failed:
        assert all(standing.ratio(row) is None and row not in standing.peers for row in standing.failed)


def test_models_that_are_many_all_appear_and_stay_on_a_page() -> None:
    names = tuple(f"vit_{size}_patch16_224" for size in ("tiny", "small", "base", "large"))
    many = example_rows.models(names, (1, 8, 64, 256))
    picture = pictures.PICTURES["models"]
    panels = picture.drawn(many)
    assert len(panels) == 16
    drawn = svg(panels)
    assert all(drawn.count(f">ViT-{letter}/16<") == 16 for letter in ("Ti", "S", "B", "L"))
    with charts.style():
        assert picture.page(many, panels).get_figheight() < 24


@pytest.mark.parametrize("name", NAMES)
def test_no_text_lies_on_another(everything, name: str) -> None:
    picture = pictures.PICTURES[name]
    with charts.style():
        figure = picture.page(everything, picture.drawn(everything))
        renderer = figure.canvas.get_renderer()
        figure.draw(renderer)
        seen = [text for text in figure.findobj(Text) if text.get_visible() and text.get_text().strip()]
        # Of the letters alone: an annotation's own extent has its line in it.
        boxes = [(text.get_text(), Text.get_window_extent(text, renderer).padded(-1)) for text in seen]
    overlapping = [(a, b) for (a, one), (b, two) in itertools.combinations(boxes, 2) if one.overlaps(two)]
    assert not overlapping
    page = figure.bbox.padded(1)
    assert not [text for text, box in boxes if box.x0 < page.x0 or box.x1 > page.x1 or box.y0 < page.y0]


def test_a_lone_row_is_enough(tmp_path: Path) -> None:
    lone = example_rows.models()[4]
    assert lone["provider"] == "fastvit"
    names = [path.name for path in plot.draw_all([lone], tmp_path)]
    assert "report.html" in names


def test_names_and_shapes() -> None:
    found = standings.standings(example_rows.ops(tokens=(50, 197, 577), batches=(8,)))
    of_images = {"patch_embed", "group_norm"}
    seen = {(s.subject, s.batch, s.tokens, s.width) for s in found if s.subject not in of_images}
    assert seen == {(op, 8, n, 768) for op in {s.subject for s in found} - of_images for n in (50, 197, 577)}
    assert {(s.tokens, s.width) for s in found if s.subject == "group_norm"} == {(112**2, 64)}
    embedding = next(s for s in found if s.subject == "patch_embed")
    assert (embedding.tokens, embedding.width) == (196, 768)
    hybrid = {**example_rows.models()[0], "case": "vit_base_r50_s16_384"}
    assert standings.Standing((hybrid,)).subject == "R50+ViT-B/16"
    other = {**example_rows.models()[0], "case": "google/vit-base", "shape": "2x3x384x384", "direction": "training"}
    assert standings.Standing((other,)).title == "google/vit-base 384 px, batch 2, float32, training"


def test_the_best_other_is_the_fastest_sound_one() -> None:
    standing = standings.standings(example_rows.models())[0]
    assert standing.peer["provider"] == "onnxruntime"
    assert standing.ours["provider"] == "fastvit"
    assert standing.against_eager == pytest.approx(2.0)
    assert standing.against_peer == pytest.approx(2.0 / 1.6)
    without = standings.Standing(tuple(row for row in standing.rows if row["provider"] != "fastvit"))
    assert without.ours["provider"] == "fastvit-cpu"


def test_the_command_draws_a_folder_or_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows.write(tmp_path / "in" / "a-chip-2-threads.csv", example_rows.models())
    (tmp_path / "in" / "other.csv").write_text("a,b\n1,2\n")
    assert plot.main([str(tmp_path / "in")]) == 0
    printed = capsys.readouterr().out.split()
    assert printed[-1] == str(tmp_path / "in" / report.NAME)
    assert not [path for path in printed if "-ops" in path]
    file = str(tmp_path / "in" / "a-chip-2-threads.csv")
    assert plot.main([file, "-o", str(tmp_path / "out")]) == 0
    assert {path.name for path in (tmp_path / "out").iterdir()} == {Path(path).name for path in printed}


def test_pictures_that_cannot_be_drawn(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with (tmp_path / "empty.csv").open("w", newline="") as file:
        csv.writer(file).writerow(rows.COLUMNS)
    for arguments, reason in (
        ([tmp_path / "none.csv"], "no such file"),
        ([tmp_path / "empty.csv"], "no rows"),
        ([tmp_path], "no rows"),
        ([tmp_path / "empty.csv", "-o", tmp_path / "empty.csv" / "new"], "no directory"),
    ):
        assert plot.main([str(argument) for argument in arguments]) == 1
        assert reason in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["empty.csv"]
