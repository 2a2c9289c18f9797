"""Opens HTML pages in a browser, at the widths of a phone and of a desk, in light and in dark, and checks them.

    python .ci/look_at_pages.py --out FOLDER PAGE [PAGE ...]       files or URLs

A page has faults if it is wider than the window, if a text has less contrast than WCAG AA asks for (4.5, and 3 for
large texts), if its console shows an error, if it asks another host for anything (with --single-file: for anything at
all), or if its headings skip a level, a picture has no name or an id stands twice. All <details> are opened for that.
FOLDER gets a screenshot of each view, and the page's accessibility tree. The exit status is 1 if there are faults.

Needs playwright, and a chromium on PATH or in $CHROMIUM. Without them it says so and checks nothing.
"""

import argparse
import os
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

WIDTHS = (360, 1280)
SCHEMES = ("light", "dark")
HEIGHT = 900
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
SHOWN = 8  # faults of a kind

# Each returns a list of texts, one for each fault.
TOO_WIDE = """() => {
    const width = document.documentElement.clientWidth;
    if (document.documentElement.scrollWidth <= width) return [];
    const scrolls = node => {
        for (let up = node.parentElement; up && up !== document.body; up = up.parentElement)
            if (['auto', 'scroll', 'hidden', 'clip'].includes(getComputedStyle(up).overflowX)) return true;
        return false;
    };
    const wide = [...document.body.querySelectorAll('*')].filter(
        node => node.getBoundingClientRect().right > width + 1 && !scrolls(node));
    const named = node => node.tagName.toLowerCase() + (node.className.baseVal ?? node.className ? '.' +
        String(node.className.baseVal ?? node.className).split(' ').join('.') : '');
    return [`${document.documentElement.scrollWidth} px wide: ${wide.slice(0, 5).map(named).join(', ')}`];
}"""

TOO_FAINT = """() => {
    const canvas = document.createElement('canvas');
    canvas.width = canvas.height = 1;
    const brush = canvas.getContext('2d', {willReadFrequently: true});
    const seen = new Map();
    const rgba = colour => {  // whatever form the colour is written in
        if (!seen.has(colour)) {
            brush.clearRect(0, 0, 1, 1);
            brush.fillStyle = colour;
            brush.fillRect(0, 0, 1, 1);
            const [r, g, b, a] = brush.getImageData(0, 0, 1, 1).data;
            seen.set(colour, [r, g, b, a / 255]);
        }
        return seen.get(colour);
    };
    const over = (top, under) => top.slice(0, 3).map((x, i) => x * top[3] + under[i] * (1 - top[3]));
    const background = node => {
        const layers = [];
        for (let up = node; up; up = up.parentElement) {
            const layer = rgba(getComputedStyle(up).backgroundColor);
            if (layer[3] > 0) layers.push(layer);
            if (layer[3] === 1) break;
        }
        const canvasColour = rgba('Canvas');
        return layers.reverse().reduce((under, layer) => over(layer, under), canvasColour.slice(0, 3));
    };
    const light = colour => {
        const [r, g, b] = colour.map(x => x / 255).map(x => x <= 0.04045 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4);
        return 0.2126 * r + 0.7152 * g + 0.0722 * b;
    };
    const faults = new Map();
    const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
    while (walker.nextNode()) {
        const node = walker.currentNode.parentElement, text = walker.currentNode.textContent.trim();
        if (!text || ['SCRIPT', 'STYLE', 'NOSCRIPT', 'TEMPLATE', 'title', 'desc'].includes(node.tagName)) continue;
        if (!node.checkVisibility({opacityProperty: true, visibilityProperty: true})) continue;
        const style = getComputedStyle(node);
        const ink = rgba(node.closest('svg') ? style.fill : style.color), paper = background(node);
        let opacity = 1;
        for (let up = node; up; up = up.parentElement) opacity *= parseFloat(getComputedStyle(up).opacity);
        const a = light(over([...ink.slice(0, 3), ink[3] * opacity], paper)), b = light(paper);
        const contrast = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
        const size = parseFloat(style.fontSize), isBold = parseInt(style.fontWeight) >= 700;
        const needed = size >= 24 || (isBold && size >= 18.66) ? 3 : 4.5;
        if (contrast < needed) faults.set(`${contrast.toFixed(2)} of ${needed}: ${text.slice(0, 40)}`, 1);
    }
    return [...faults.keys()];
}"""

BADLY_BUILT = """() => {
    const faults = [];
    let level = 0;
    for (const heading of document.querySelectorAll('h1, h2, h3, h4, h5, h6')) {
        const here = parseInt(heading.tagName[1]);
        if (here > level + 1) faults.push(`h${here} follows h${level}: ${heading.textContent.trim().slice(0, 40)}`);
        level = here;
    }
    if (document.querySelectorAll('h1').length !== 1) faults.push('a page has one h1');
    if (!document.documentElement.lang) faults.push('html has no lang');
    const ids = new Set();
    for (const node of document.querySelectorAll('[id]')) {
        if (ids.has(node.id)) faults.push(`the id ${node.id} stands twice`);
        ids.add(node.id);
    }
    for (const image of document.querySelectorAll('img:not([alt])')) faults.push(`img without alt: ${image.src}`);
    for (const image of document.querySelectorAll('svg[role=img]'))
        if (!image.querySelector('title') && !image.ariaLabel) faults.push('svg without a title');
    for (const table of document.querySelectorAll('table'))
        if (!table.querySelector('th')) faults.push('table without th');
    return faults;
}"""
CHECKS = {"too wide": TOO_WIDE, "too faint": TOO_FAINT, "badly built": BADLY_BUILT}
OPEN_ALL = "() => document.querySelectorAll('details').forEach(node => { node.open = true; })"


def main(args: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pages", nargs="+", metavar="PAGE")
    parser.add_argument("--out", type=Path, required=True, help="a folder for the screenshots")
    parser.add_argument("--single-file", action="store_true", help="a page may ask for nothing beside itself")
    given = parser.parse_args(args)
    browser = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, BROWSERS)), None)
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        print("No page was looked at: playwright is not installed.")
        return 0
    if browser is None:
        print(f"No page was looked at: none of {', '.join(BROWSERS)} is on PATH.")
        return 0
    given.out.mkdir(parents=True, exist_ok=True)
    faults = 0
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=browser, args=["--no-sandbox"])
        for page in given.pages:
            for fault in look_at(chromium, page, given.out, single_file=given.single_file):
                print(fault)
                faults += 1
        chromium.close()
    print(f"{len(given.pages)} pages looked at, {faults} faults; screenshots in {given.out}")
    return 1 if faults else 0


def look_at(chromium: Any, page: str, out: Path, *, single_file: bool) -> Iterator[str]:
    """The faults of a page, in words."""
    url = page if "://" in page else Path(page).resolve().as_uri()
    name = re.sub(r"\W+", "_", urlsplit(url).path.removesuffix(".html")).strip("_")[-60:] or "index"
    for width in WIDTHS:
        for scheme in SCHEMES:
            view = f"{page}, {width} px, {scheme}"
            opened = chromium.new_page(viewport={"width": width, "height": HEIGHT}, color_scheme=scheme)
            messages, requests = [], []
            opened.on("console", lambda message, to=messages: to.append(message) if message.type == "error" else None)
            opened.on("pageerror", lambda error, to=messages: to.append(error))
            opened.on("request", lambda request, to=requests: to.append(request.url))
            opened.goto(url, wait_until="load")
            opened.screenshot(path=out / f"{name}_{width}_{scheme}.png", full_page=True)
            yield from _told(view, "too wide", opened.evaluate(TOO_WIDE))
            opened.evaluate(OPEN_ALL)
            for kind, check in CHECKS.items():
                yield from _told(view, f"opened, {kind}", opened.evaluate(check))
            yield from _told(view, "console", [str(getattr(m, "text", m)) for m in messages])
            yield from _told(view, "asks for", [x for x in requests if not _is_allowed(x, url, single_file)])
            if (width, scheme) == (WIDTHS[0], SCHEMES[0]):
                (out / f"{name}.aria.txt").write_text(opened.locator("body").aria_snapshot() + "\n")
            opened.close()


def _is_allowed(request: str, url: str, single_file: bool) -> bool:
    asked, page = urlsplit(request), urlsplit(url)
    if asked.scheme in ("data", "blob") or request.partition("#")[0] == url.partition("#")[0]:
        return True
    return not single_file and (asked.scheme, asked.netloc) == (page.scheme, page.netloc)


def _told(view: str, kind: str, faults: list[str]) -> Iterator[str]:
    more = f" (and {len(faults) - SHOWN} more)" if len(faults) > SHOWN else ""
    if faults:
        yield f"{view}: {kind}: " + "; ".join(faults[:SHOWN]) + more


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
