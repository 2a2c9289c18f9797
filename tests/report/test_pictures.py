"""Pictures stand inside a page: the same each time, in its colours, with ids of their own."""

import dataclasses
import math

import numpy as np
from html_pages import HtmlPage

from lora_dpo_jax.report.charts import Line, lines_chart
from lora_dpo_jax.report.pictures import picture
from lora_dpo_jax.report.run_files import Series

MARKUP = "</title></svg><script>alert(1)</script>"


def test_pictures_are_the_same_each_time_and_take_their_colours_from_the_page():
    lines = [Line(f"{MARKUP} ${i}", Series(np.array([0, 1, 2]), np.array([0.0, i, math.nan]))) for i in (1, 2)]
    chart = dataclasses.replace(lines_chart("a", MARKUP, lines), level=("half", 0.5))
    first, second = picture(chart, "a"), picture(chart, "a")
    assert first == second and "var(--c0)" in first and "currentColor" in first
    page = HtmlPage(first)
    assert page.tags <= {"svg", "title", "desc", "g", "path", "defs", "use", "clippath", "rect", "text"}
    assert page.pictures[0][0] == MARKUP and all(name.startswith("a-") for name in page.ids)
    assert set(page.loads) <= {f"#{name}" for name in page.ids}
    assert "#0" not in first.replace('"#', "")
