"""A report's page for tests, read back as a reader's program sees it."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path

from bench_results import a_result

from skipstep.bench.page.plots import STYLE_SHEET

ROOT = Path(__file__).parents[1]
DARK = dict(re.findall(r"--(\w+):(#\w{6})", STYLE_SHEET.split("@media")[1]))


class Page(HTMLParser):
    """The elements of a page, with their ids, links and text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.source = text
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text += data

    def all(self, tag):
        return [attributes for name, attributes in self.elements if name == tag]

    @property
    def plots(self):
        return [attributes for attributes in self.all("svg") if attributes.get("role") == "img"]

    def rows(self, label):
        """The cells of the table with that label, by row."""
        body = re.search(rf'aria-label="{re.escape(label)}".*?<tbody>(.*?)</tbody>', self.source, re.DOTALL).group(1)
        return [re.findall(r"<t[hd][^>]*>([^<]*)</t[hd]>", row) for row in body.split("</tr>")[:-1]]


def small(commit="011de5f", **options):
    return a_result(commit, models=("fashion-mnist",), **{"steps": (5, 10, 20), "batches": (1,), **options})
