"""The report: whole, self-contained, fit for a phone. Where a Chromium is, it is opened in one."""

from html.parser import HTMLParser
from pathlib import Path

import example_rows
import pytest

from fastvit.benchmarks import browser, report, standings

VOID = {"meta", "br", "input", "link", "img"}


class Page(HTMLParser):
    """What a document holds: its tags, whether each is closed, its links and its text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.text = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if not self.open or self.open[-1] not in ("script", "style"):
            self.text += data


@pytest.fixture(scope="module")
def found() -> list[dict]:
    return [*example_rows.models(), *example_rows.ops()]


@pytest.fixture(scope="module")
def document(found) -> str:
    return report.page(found, "0a1b")


def test_the_document_is_whole_and_asks_for_nothing(found, document: str) -> None:
    page = Page(document)
    assert page.open == []
    assert ("meta", {"name": "viewport", "content": "width=device-width, initial-scale=1"}) in page.tags
    assert ("meta", {"name": "rows", "content": "0a1b"}) in page.tags
    links = [value for _, attributes in page.tags for name in ("src", "href") if (value := attributes.get(name))]
    assert links and all(link.startswith("#") for link in links)
    assert "url(http" not in document and "@import" not in document
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    assert {link[1:] for link in links} <= set(ids)
    assert len(document) < 3e6


def test_every_case_is_there_and_a_failure_with_its_reason(found, document: str) -> None:
    page = Page(document)
    for standing in standings.standings(found):
        assert standing.title in page.text
    assert page.text.count(example_rows.HOSTILE) >= 1
    assert "<script>alert" not in document
    assert document.count("<script>") == 1
    assert "2.00x eager" in page.text
    assert "1.25x the best peer (ONNX Runtime)" in page.text


def test_the_same_rows_give_the_same_document(found, document: str) -> None:
    assert report.page(found, "0a1b") == document


def test_the_document_in_a_browser(document: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "report.html").write_text(document, encoding="utf-8")
    if browser.find() is None:
        assert report.main(["--check", str(tmp_path / "report.html")]) == 1
        assert "no browser" in capsys.readouterr().err
        return
    code = report.main(["--check", str(tmp_path / "report.html")])
    assert code == 0, capsys.readouterr().err
    bad = (
        "<!doctype html><p style='width: 2000px; font-size: 9px'>wide</p><img src='http://127.0.0.1:9/x.png'>"
        "<script>missing()</script>"
    )
    said = " ".join(browser.faults(bad))
    for fault in ("wide", "9 pixels high", "requests", "missing is not defined"):
        assert fault in said, said


def test_a_report_that_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert report.main(["--check", str(tmp_path / "none.html")]) == 1
    assert "none.html" in capsys.readouterr().err
