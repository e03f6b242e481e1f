"""The HTML: it needs nothing else, shows every figure, and treats prompts as text."""

from __future__ import annotations

import base64
import io
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from ditkit.analysis.report import headline, render
from ditkit.analysis.result import BenchResult, Row

NASTY = '<script>alert("x")</script> & "quotes"'


def row(label: str, kind: str, **figures) -> Row:
    return Row(label, kind, **{"steps": 28, "steps_computed": 28, **figures})


@pytest.fixture
def result() -> BenchResult:
    rows = [
        row("dense", "dense", seconds=2.0, time_ratio=1.0, flops_ratio=1.0, latent_error=0.0),
        row(
            "taylorseer:interval=3",
            "method",
            steps_computed=11,
            seconds=1.0,
            time_ratio=0.5,
            flops=1.5e9,
            flops_ratio=0.4,
            bytes_cached=3 * 2**20,
            latent_error=0.07,
            picture_psnr=31.25,
            accuracy=0.875,
        ),
        row("peer <b>", "peer", notes=[NASTY]),
        row("plain, 11 steps", "plain", steps=11, steps_computed=11, time_ratio=0.4, latent_error=0.13),
    ]
    pictures = {r.label: np.full((2, 8, 8, 3), 0.5) for r in rows if r.kind != "peer"}
    return BenchResult(rows, ["red apple", NASTY], {"steps": 28, "size": None}, {"torch": "x"}, pictures)


class Page(HTMLParser):
    """Tags with their attributes, and the text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag, attrs) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "img", "link", "line", "circle", "polyline"):
            self.open.append(tag)

    def handle_endtag(self, tag) -> None:
        if tag in self.open:
            assert self.open.pop() == tag, f"</{tag}> closes nothing"

    def handle_data(self, data) -> None:
        self.text += data


def test_it_is_well_formed(result) -> None:
    page = Page(render(result, "a title"))
    assert page.open == []


def test_it_needs_nothing_else(result) -> None:
    html = render(result, "a title")
    page = Page(html)
    assert "script" not in [tag for tag, _ in page.tags]
    assert "link" not in [tag for tag, _ in page.tags]
    sources = [attributes["src"] for tag, attributes in page.tags if tag == "img"]
    assert len(sources) == 3 * 2
    assert all(source.startswith("data:image/png;base64,") for source in sources)
    assert not re.search(r"https?://|@import|url\(", html)


def test_pictures_are_the_pictures(result) -> None:
    result.pictures["dense"][1, :, :, 0] = 1.0
    page = Page(render(result, "a title"))
    sources = [attributes["src"] for tag, attributes in page.tags if tag == "img"]
    with Image.open(io.BytesIO(base64.b64decode(sources[1].split(",")[1]))) as image:
        assert image.size == (8, 8)
        assert image.getpixel((3, 3)) == (255, 128, 128)


def test_text_from_outside_stays_text(result) -> None:
    result.rows[2].label = NASTY
    html = render(result, NASTY)
    assert "<script" not in html
    assert Page(html).text.count(NASTY) >= 4  # title, heading, prompt, label, note


def test_every_figure_is_shown(result) -> None:
    text = Page(render(result, "a title")).text
    for figure in ("11 of 28", "0.500", "0.400", "1.50 G", "3.00 MiB", "0.0700", "31.2", "88 %"):
        assert figure in text, figure
    assert "the pipeline's own" in text  # the size was not given


def test_marks_carry_the_numbers_of_the_rows(result) -> None:
    html = render(result, "a title")
    marks = re.findall(r'<text [^>]*text-anchor="middle">(\d)</text></g>', html)
    assert marks == ["2", "4", "2", "4"][: len(marks)]
    assert len(marks) == 3  # by time the method and plain sampling, by FLOPs the method alone


def test_headline_names_the_best(result) -> None:
    text = headline(result)
    assert text.startswith("taylorseer:interval=3 took 0.50 of dense sampling's time")
    assert "0.070" in text
    assert "plain sampling with the same 11 computed steps has 0.130" in text


@pytest.mark.parametrize("change", [{"time_ratio": 1.1}, {"latent_error": 0.2}, {"latent_error": None}])
def test_headline_does_not_praise(result, change) -> None:
    for name, value in change.items():
        setattr(result.rows[1], name, value)
    assert headline(result).startswith("In this run no method was")


def test_without_pictures_and_figures() -> None:
    html = render(BenchResult([row("dense", "dense")], ["x"], {}, {}), "empty")
    assert "<svg" not in html
    assert "<img" not in html
