"""The page itself: in a browser at two widths and in two themes; escaping; nothing from outside."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from latbench.oracle.store import StoredModel
from latbench.report.gather import gather
from latbench.tables import LatencyTable, Provenance, Row

pytest.importorskip("vl_convert", reason="the report extra is not installed")

from latbench.report.page import page, write_page

HOSTILE = "</script><b>Xeon & \"co\" 'x'</b>"


def hostile_table() -> LatencyTable:
    rows = [
        Row(
            f"k{i:04}", "block", "s", "sandwich", block_type=HOSTILE, site="a", macs=10**6 * (i + 1),
            latency_ms=0.1 * (i + 1), ci_low_ms=0.099 * (i + 1), ci_high_ms=0.101 * (i + 1),
        )
        for i in range(300)
    ]  # fmt: skip
    return LatencyTable.from_rows(rows, Provenance("cpu", HOSTILE, "onnxruntime"))


def data_of(text: str) -> dict[str, Any]:
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.DOTALL)
    assert found is not None
    return dict(json.loads(found[1]))


@pytest.fixture(scope="module")
def everything(
    tmp_path_factory: pytest.TempPathFactory, table: LatencyTable, stored: StoredModel, found_folder: Path
) -> Path:
    """A page with a table, a model and a search."""
    path = tmp_path_factory.mktemp("page") / "r.html"
    sections = gather([("t.parquet", table), ("m.npz", stored), ("run", found_folder), ("h.parquet", hostile_table())])
    write_page(path, "All of it", sections, pictures=False)
    return path


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Debian's Chromium, headless."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("no Chromium here: apt-get install chromium")
    with playwright.sync_playwright() as started:
        found = started.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield found
        found.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
def test_the_page_is_drawn_without_errors_or_requests_and_fits(
    everything: Path, browser: Any, width: int, scheme: str
) -> None:
    context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
    tab = context.new_page()
    told: list[str] = []
    requests: list[str] = []
    tab.on("console", lambda message: told.append(message.text))
    tab.on("pageerror", lambda error: told.append(str(error)))
    tab.on("request", lambda request: requests.append(request.url))
    tab.goto(everything.as_uri())
    tab.wait_for_function("document.documentElement.dataset.ready === 'yes'", timeout=30_000)
    assert told == []
    assert requests == [everything.as_uri()]
    assert tab.evaluate("document.documentElement.scrollWidth") <= width
    charts = tab.evaluate("[...document.querySelectorAll('.chart canvas')].map((c) => [c.clientWidth, c.clientHeight])")
    assert len(charts) == tab.locator(".chart").count() >= 8
    assert all(100 < w <= width and h > 60 for w, h in charts)
    paper = tab.evaluate("getComputedStyle(document.body).backgroundColor")
    assert paper == ("rgb(255, 255, 255)" if scheme == "light" else "rgb(21, 23, 26)")
    context.close()


def test_rows_are_sorted_filtered_and_only_those_in_sight_are_drawn(everything: Path, browser: Any) -> None:
    tab = browser.new_page(viewport={"width": 1280, "height": 900})
    tab.goto(everything.as_uri())
    grid = tab.locator("[data-grid=part4-rows]")
    assert grid.locator("tbody tr td:first-child").count() < 60  # of 300
    assert grid.locator(".count").inner_text() == "300 rows"
    assert grid.locator("tbody td").first.inner_text().startswith("</script><b>Xeon")

    def first_key() -> str:
        return str(grid.locator("tbody tr:has(td)").first.locator("td").last.inner_text())

    heading = grid.get_by_role("button", name="latency, ms")
    heading.click()
    assert first_key() == "k0299"
    assert grid.locator("th[aria-sort=descending]").inner_text().startswith("latency")
    heading.click()
    assert first_key() == "k0000"
    grid.locator("input").fill("k012 block")
    assert grid.locator(".count").inner_text() == "10 of 300 rows"
    grid.locator("input").fill("")
    grid.locator(".rows").evaluate("(element) => { element.scrollTop = element.scrollHeight; }")
    grid.get_by_text("k0299").wait_for(timeout=5000)
    tab.close()


def test_texts_of_the_table_are_never_markup(everything: Path) -> None:
    text = everything.read_text()
    assert "<b>Xeon" not in text
    data = data_of(text)
    assert data["grids"]["part4-rows"]["values"]["group"][0] == HOSTILE
    assert text.count("</script>") == 3  # of the data, the runtime and the page itself


def test_nothing_is_loaded_from_outside(everything: Path) -> None:
    head = everything.read_text().split("<script", 1)[0]
    assert '<link rel="icon" href="data:,">' in head
    assert "http" not in head.replace("http://www.w3.org/2000/svg", "")
    assert "@import" not in head
    assert "url(" not in head


def test_figures_keep_five_digits_in_the_page_and_all_in_the_parquet_file(tmp_path: Path) -> None:
    row = Row("k", "block", "s", macs=123456789, latency_ms=1.23456789, ci_low_ms=1.2, ci_high_ms=1.3)
    table = LatencyTable.from_rows([row, replace(row, key="x", latency_ms=2.0)], Provenance("cpu", "Xeon", "ort"))
    write_page(tmp_path / "r.html", "t", gather([("t", table)]), pictures=False)
    values = data_of((tmp_path / "r.html").read_text())["grids"]["part1-rows"]["values"]
    assert (values["ms"], values["macs"]) == ([1.2346, 2], [123460000, 123460000])
    import pandas as pd

    assert pd.read_parquet(tmp_path / "r.parquet")["ms"].tolist() == [1.23456789, 2.0]


def test_pictures_are_written_for_papers(tmp_path: Path) -> None:
    rows = [
        Row(f"k{i}", "block", "s", block_type=f"conv@{i % 2}", site=f"s{i}", macs=10**6 * i, latency_ms=0.1 * i)
        for i in range(1, 30)
    ]
    write_page(tmp_path / "r.html", "t", gather([("t", LatencyTable.from_rows(rows, Provenance("cpu", "X", "ort")))]))
    svg = (tmp_path / "r_pictures" / "part1-latency.svg").read_text()
    assert svg.startswith("<svg")
    assert svg.count("<path") > len(rows)
    assert "conv@1" in svg  # a name, not a colour
    assert '"@' not in svg  # every colour was filled in
    png = (tmp_path / "r_pictures" / "part1-latency.png").read_bytes()
    assert png.startswith(b"\x89PNG")
    assert int.from_bytes(png[16:20], "big") > 1200  # pixels wide


def test_a_page_without_charts_needs_no_runtime() -> None:
    empty = LatencyTable.from_rows([], Provenance("cpu", "Xeon", "ort"))
    text = page("t", gather([("t", empty)]))
    assert len(text) < 30_000
    assert "The table is empty." in text


def test_twenty_thousand_rows_would_stay_below_five_megabytes() -> None:
    """benchmarks/report_size.py makes such a page; here the size of a row is measured on fewer."""

    def size(n: int) -> int:
        rng = np.random.default_rng(0)
        macs = (10 ** rng.uniform(5, 9, n)).astype(int)
        ms = macs / 10 ** rng.normal(7.5, 0.2, n)
        rows = [
            Row(
                f"{i:016x}", "block", "s", "sandwich", block_type=f"separable conv s{i % 6}", site=f"stage{i % 20}",
                macs=int(macs[i]), latency_ms=ms[i], ci_low_ms=0.99 * ms[i], ci_high_ms=1.01 * ms[i],
            )
            for i in range(n)
        ]  # fmt: skip
        return len(page("t", gather([("t", LatencyTable.from_rows(rows, Provenance("cpu", "Xeon", "ort")))])).encode())

    small, large = size(500), size(1500)
    assert small + (large - small) / 1000 * 19_500 < 5_000_000
