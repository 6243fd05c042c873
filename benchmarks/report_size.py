"""How long does the page of a large table take, and how large is it? ``python benchmarks/report_size.py [ROWS]``.

A table of 20,000 made-up rows goes through ``latbench report``, pictures included; the page is then opened in
Chromium, where there is one, until every chart is drawn. Aims: below 10 s and 5 MB.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from latbench.report.gather import gather
from latbench.report.page import write_page
from latbench.tables import LatencyTable, Provenance, Row

AIM_S, AIM_MB = 10.0, 5.0


def made_up(n: int) -> LatencyTable:
    """`n` blocks of eight types, one network to a hundred blocks, a failure to a thousand."""
    rng = np.random.default_rng(0)
    macs = (10 ** rng.uniform(5, 9, n)).astype(int)
    ms = macs / 10 ** rng.normal(7.5, 0.2, n)
    half = 0.01 * ms * np.exp(0.5 * rng.standard_normal(n))
    rows = []
    for i in range(n):
        figures = {"latency_ms": ms[i], "ci_low_ms": ms[i] - half[i], "ci_high_ms": ms[i] + half[i]}
        kind = "network" if i % 100 == 0 else "block"
        row = Row(
            f"{i:016x}",
            kind,
            f"Conv2d({i})",
            "isolated" if kind == "network" else "sandwich",
            site=f"stage{i % 20}",
            block_type=f"separable conv s{i % 8}",
            arch=tuple(int(k) for k in rng.integers(0, 9, 14)) if kind == "network" else None,
            macs=int(macs[i]),
            **({"status": "error", "stage": "load", "error": "refused"} if i % 1000 == 999 else figures),
        )
        rows.append(row)
    sums = {"measured_ms": ms[:200].tolist(), "predicted_ms": (ms[:200] * rng.normal(0.97, 0.02, 200)).tolist()}
    provenance = Provenance("cpu", "made up", "onnxruntime", space="mobilenet_v1")
    return LatencyTable.from_rows(rows, provenance, {"additivity": sums})


def drawn_in_s(page: Path) -> float | None:
    """From opening the page to the last chart; None without Chromium or playwright."""
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        return None
    if chromium is None:
        return None
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        tab = browser.new_page()
        begin = time.perf_counter()
        tab.goto(page.as_uri())
        tab.wait_for_function("document.documentElement.dataset.ready === 'yes'", timeout=60_000)
        wall = time.perf_counter() - begin
        browser.close()
    return wall


def main() -> None:
    n = int(sys.argv[1]) if len(sys.argv) > 1 else 20_000
    table = made_up(n)
    with tempfile.TemporaryDirectory() as folder:
        page = Path(folder) / "report.html"
        begin = time.perf_counter()
        write_page(page, "made up", gather([("made up", table)]))
        wall, size = time.perf_counter() - begin, page.stat().st_size / 1e6
        drawn = drawn_in_s(page)
    print(f"{n} rows: page and pictures in {wall:.1f} s (aim: below {AIM_S:g}), {size:.2f} MB (aim: below {AIM_MB:g})")
    print(
        "drawn by Chromium: " + ("not tried, no Chromium or playwright here" if drawn is None else f"in {drawn:.1f} s")
    )


if __name__ == "__main__":
    main()
