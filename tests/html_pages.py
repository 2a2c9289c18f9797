"""Reads HTML pages for tests, as a browser's parser sees them, and checks that they stand by themselves."""

import re
from html.parser import HTMLParser

VOID = {"meta", "link", "br", "img", "input", "hr"}
LOADS = {"src", "srcset", "action", "data", "poster", "background", "formaction", "href", "xlink:href"}


class HtmlPage(HTMLParser):
    """The tags, ids, headings, tables and text of a page. Raises AssertionError if tags are not closed in order."""

    def __init__(self, text: str):
        super().__init__(convert_charrefs=True)
        self.tags: set[str] = set()
        self.attributes: set[str] = set()
        self.ids: list[str] = []
        self.loads: list[str] = []
        self.headings: list[tuple[int, str]] = []
        self.tables: dict[str, list[list[str]]] = {}  # by caption
        self.pictures: list[tuple[str, str]] = []  # (title, description) of each svg
        self.styles = ""
        self.text = ""
        self._open: list[str] = []
        self._heard: list[str] = []  # text of each open tag
        self.feed(text)
        self.close()
        assert not self._open, f"not closed: {self._open}"

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        for name, value in attrs:
            self.attributes.add(name)
            if name == "id":
                self.ids.append(value)
            if name in LOADS:
                self.loads.append(value)
            if name == "style":
                self.styles += value + "\n"
        if tag == "svg":
            self.pictures.append(("", ""))
        if tag == "table":
            self._caption, self._rows = "", []
        if tag == "tr":
            self._rows.append([])
        if tag not in VOID:
            self._open.append(tag)
            self._heard.append("")

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.handle_endtag(tag)

    def handle_endtag(self, tag):
        assert self._open and self._open[-1] == tag, f"</{tag}> closes {self._open[-3:]}"
        self._open.pop()
        heard = self._heard.pop()
        if self._heard:
            self._heard[-1] += heard
        if re.fullmatch(r"h[1-6]", tag):
            self.headings.append((int(tag[1]), heard.strip()))
        elif tag == "caption":
            self._caption = heard.strip()
        elif tag in ("td", "th"):
            self._rows[-1].append(heard.strip())
        elif tag == "table":
            self.tables[self._caption] = self._rows
        elif tag in ("title", "desc") and self._open[-1:] == ["svg"]:
            title, description = self.pictures[-1]
            self.pictures[-1] = (heard, description) if tag == "title" else (title, heard)
        elif tag == "style":
            self.styles += heard

    def handle_data(self, data):
        if self._open and self._open[-1] != "style":
            self.text += data
        if self._heard:
            self._heard[-1] += data


def checked_page(text: str) -> HtmlPage:
    """The page, if it is valid, loads nothing, runs nothing, and has its headings in order and its pictures named."""
    page = HtmlPage(text)
    assert text.startswith("<!DOCTYPE html>\n<html lang=")
    assert len(page.ids) == len(set(page.ids))
    assert not [name for name in page.attributes if name.startswith("on")]
    assert not page.tags & {"script", "iframe", "object", "embed", "link", "img", "base", "form"}
    assert all(target.startswith("#") and target[1:] in page.ids for target in page.loads)
    assert not re.search(r"@import|url\((?!#)", page.styles)
    assert all(target in page.ids for target in re.findall(r"url\(#([^)]+)\)", text))
    levels = [level for level, _ in page.headings]
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(after <= before + 1 for before, after in zip(levels, levels[1:], strict=False))
    assert all(title and description for title, description in page.pictures)
    assert all(rows and any(map(any, rows)) for rows in page.tables.values())
    assert len(text.encode()) < 2_000_000
    return page
