"""The page in a real Chromium: its switches, its widths, its colours, and that it asks nobody else for anything.

Run by `make test-browser`. CHROMIUM names the browser; without it the usual names are looked for.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Thread
from typing import Any

import pytest

from collage.report import watch
from collage.report.differences import differences
from collage.report.groups import group_runs
from collage.report.page import context, html, texts
from collage.report.runs import read_runs
from collage.report.stats import smooth
from collage.report.summary import summarize
from collage.report.view import view

pytestmark = pytest.mark.browser

MakeRun = Callable[..., Path]
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
NAMES = ("chromium", "chromium-browser", "google-chrome")
STRATEGIES = ("plain", "plus", "mixed")
MS = 60_000
"""How long the page may take for anything; a busy machine is slow."""


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A browser with a new, empty profile."""
    from playwright.sync_api import sync_playwright

    found = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)
    if found is None:
        pytest.fail(f"found none of {', '.join(NAMES)}; remedy: apt-get install chromium, or CHROMIUM=/path/to/it")
    with sync_playwright() as playwright:
        context = playwright.chromium.launch_persistent_context(
            tmp_path_factory.mktemp("profile"), executable_path=found, args=list(FLAGS), headless=True
        )
        yield context
        context.close()


@contextmanager
def opened(browser: Any, address: str, *, width: int = 1280, height: int = 900, scheme: str = "light") -> Iterator[Any]:
    """The page, drawn. At its end there must have been no error, and nothing asked of anybody but its own server."""
    page = browser.new_page()
    errors: list[str] = []
    asked: list[str] = []
    page.on("console", lambda message: errors.append(message.text) if message.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("request", lambda request: asked.append(request.url))
    page.set_default_timeout(MS)
    page.set_viewport_size({"width": width, "height": height})
    page.emulate_media(color_scheme=scheme)
    page.goto(address)
    page.wait_for_selector("html[data-ready]")
    yield page
    page.close()
    own = re.compile(rf"(blob:.*|{re.escape(address)}(data\.json\?known=\d+)?)$")
    assert [url for url in asked if not own.match(url)] == []
    assert errors == []


def write_page(folder: Path) -> str:
    """The address of the page on the runs in `folder`, written without the pictures that go beside it."""
    runs = read_runs([folder])
    groups = group_runs(runs)
    page = html(texts(context(summarize(runs), differing=differences(groups))), view(groups))
    (folder / "report.html").write_text(page)
    return (folder / "report.html").as_uri()


@pytest.fixture(scope="module")
def address(run_writer: MakeRun, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A page on three strategies with two seeds each, audited by module."""
    folder = tmp_path_factory.mktemp("runs")
    for strategy in STRATEGIES:
        for seed in (0, 1):
            run_writer(folder, strategy, seed, audited=True)
    return write_page(folder)


@pytest.fixture
def page(browser: Any, address: str) -> Iterator[Any]:
    with opened(browser, address) as page:
        yield page


def traces(page: Any, plot: str, kind: str | None = "mean") -> dict[str, dict[str, Any]]:
    """The traces of a kind that plotly holds for a plot, by their group (runs: by their name)."""
    found = page.evaluate(
        "id => document.getElementById(id).data.map(({meta, x, y, z}) => ({...meta, x, y, z}))", f"plot-{plot}"
    )
    return {trace.get("run") or trace.get("group") or trace["part"]: trace for trace in found if trace["kind"] == kind}


def paths(page: Any, plot: str) -> int:
    """How many curves stand in the drawing itself."""
    return page.locator(f"#plot-{plot} .scatterlayer .trace").count()


def note(page: Any, plot: str) -> str:
    return page.locator(f"#note-{plot}").inner_text()


# ---- what is drawn ---------------------------------------------------------------------------------------------------


def test_every_plot_is_drawn_for_every_strategy_and_run(page: Any) -> None:
    for plot in ("loss", "edq", "lost", "modules"):
        assert set(traces(page, plot)) == set(STRATEGIES)
    for plot in ("loss", "edq", "lost"):
        assert set(traces(page, plot, "run")) == {f"{name}-seed{seed}" for name in STRATEGIES for seed in (0, 1)}
        assert paths(page, plot) == 9
    assert set(traces(page, "validation")) == {"plain", "plus"}
    assert set(traces(page, "memory", "bar")) == {"weight", "gradient", "m", "v", "low parts, master copy"}
    (heat,) = traces(page, "histogram", "histogram").values()
    assert [len(heat["z"]), len(heat["z"][0])] == [5, 6]
    assert heat["y"] == [-2.5, -1.5, -0.5, 0.5, 1.5]
    assert [row[0] for row in heat["z"]] == pytest.approx([0.1, 0.2, 0.4, 0.2, 0.1])
    assert page.locator(".plot[role=img][aria-label]").count() == 7


def test_curves_hold_the_figures_of_the_files(page: Any) -> None:
    edq = traces(page, "edq")["plain"]
    assert edq["x"] == [10, 20, 30, 40, 50, 60]
    assert edq["y"] == pytest.approx([1 - 0.83 * step / 60 for step in edq["x"]], abs=1e-5)


def test_hovering_shows_the_values_of_every_strategy(page: Any) -> None:
    page.locator("#plot-edq").scroll_into_view_if_needed()
    box = page.locator("#plot-edq .nsewdrag").first.bounding_box()
    page.mouse.move(box["x"] + box["width"] * 0.8, box["y"] + box["height"] / 2, steps=4)
    page.wait_for_selector("#plot-edq .hoverlayer .legend", state="attached")
    said = page.locator("#plot-edq .hoverlayer").text_content()
    for strategy in STRATEGIES:
        assert re.search(rf"{strategy} : -?[01]\.\d{{4}}", said), said


# ---- switches --------------------------------------------------------------------------------------------------------


def test_strategies_are_switched_off_and_on_in_every_plot(page: Any) -> None:
    page.get_by_label("plain", exact=True).uncheck()
    for plot in ("loss", "edq", "lost", "modules"):
        assert set(traces(page, plot)) == {"plus", "mixed"}
    assert paths(page, "edq") == 6
    assert set(traces(page, "validation")) == {"plus"}
    page.get_by_role("button", name="none").click()
    assert note(page, "loss") == "Every strategy is switched off."
    assert page.locator("#plot-loss").is_hidden()
    page.get_by_role("button", name="all").click()
    assert set(traces(page, "loss")) == set(STRATEGIES)
    assert page.locator("#plot-loss").is_visible()
    assert note(page, "loss") == ""


def test_the_keyboard_reaches_and_moves_the_switches(page: Any) -> None:
    page.locator("#theme").focus()
    order: list[str] = []
    while "histogram-group" not in order and len(order) < 200:  # the last of them
        page.keyboard.press("Tab")
        order.append(page.evaluate("document.activeElement.id || document.activeElement.name"))
        if order[-1] == "plain":
            page.keyboard.press("Space")
        if order[-1] == "smoothing":
            page.keyboard.press("ArrowRight")
    plots = ("loss-figure", "loss-log", "lost-figure", "lost-log", "modules-figure", "histogram-group")
    assert [name for name in order if name] == [*STRATEGIES, "module", "axis", "smoothing", "seeds", *plots]
    assert set(traces(page, "loss")) == {"plus", "mixed"}
    assert page.locator("output").inner_text() == "6 %"


def test_a_module_is_shown_alone(page: Any) -> None:
    page.locator("#module").select_option("model.layers.0.norm")
    lost = traces(page, "lost")["plain"]
    assert lost["y"] == pytest.approx([0.75 * 0.83 * step / 60 for step in lost["x"]], abs=1e-4)
    page.locator("#module").select_option("head")
    assert set(traces(page, "edq")["plain"]["y"]) == {1}
    page.locator("#lost-figure").select_option("v_lost_fraction")  # which the runs have in total, but null by module
    assert note(page, "lost") == "Nothing was recorded."


def test_a_click_on_a_mark_shows_its_module(page: Any) -> None:
    marks = page.locator("#plot-modules .scatterlayer .trace").first.locator(".point")
    marks.nth(1).scroll_into_view_if_needed()
    box = marks.nth(1).bounding_box()
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2, steps=3)
    page.wait_for_selector("#plot-modules .hoverlayer .hovertext")
    page.mouse.down()
    page.mouse.up()
    page.wait_for_function("document.getElementById('module').value === 'model.layers.0.mlp.up'")


def test_tokens_smoothing_scale_and_single_runs(page: Any) -> None:
    page.get_by_label("Along").select_option("tokens")
    assert traces(page, "loss")["plus"]["x"][:3] == [2048, 4096, 6144]
    page.get_by_label("Smoothing").fill("0")
    runs = traces(page, "loss", "run")
    means = [(a + b) / 2 for a, b in zip(runs["plus-seed0"]["y"], runs["plus-seed1"]["y"], strict=True)]
    assert traces(page, "loss")["plus"]["y"] == pytest.approx(means)
    page.get_by_label("Smoothing").fill("20")
    assert traces(page, "loss")["plus"]["y"] == pytest.approx(list(smooth(means, 0.2)))
    page.get_by_label("each run").uncheck()
    assert traces(page, "loss", "run") == {}
    assert paths(page, "loss") == 3
    page.locator("#loss-log").check()
    assert page.evaluate("document.getElementById('plot-loss').layout.yaxis.type") == "log"


def test_the_loss_minus_the_baseline_is_one_of_the_figures(page: Any) -> None:
    page.locator("#loss-figure").select_option(label="training loss minus mixed")
    assert set(traces(page, "loss")) == {"plain", "plus"}
    assert "Not recorded for mixed" in note(page, "loss")


def test_zooming_into_one_plot_moves_the_others(page: Any) -> None:
    page.locator("#plot-lost").scroll_into_view_if_needed()
    box = page.locator("#plot-lost .nsewdrag").first.bounding_box()
    page.mouse.move(box["x"] + box["width"] * 0.25, box["y"] + box["height"] / 2)
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] * 0.75, box["y"] + box["height"] / 2, steps=5)
    page.mouse.up()
    ranges = "['lost', 'loss', 'edq'].map(name => document.getElementById(`plot-${name}`).layout.xaxis.range)"
    page.wait_for_function(f"(ranges => ranges[1][0] > 5 && ranges[1][1] < 55)({ranges})")
    first, *others = page.evaluate(ranges)
    assert others == [pytest.approx(first)] * 2


def test_the_table_sorts_by_any_column_and_back(page: Any) -> None:
    def order() -> list[str]:
        return page.locator("table.sortable tbody th").all_inner_texts()

    assert order() == ["plain", "plus", "mixed"]
    page.get_by_role("button", name="validation loss").click()
    assert order() == ["mixed", "plus", "plain"]
    page.get_by_role("button", name="bytes/param").click()
    page.get_by_role("button", name="bytes/param").click()
    assert order() == ["mixed", "plus", "plain"]
    assert page.locator("th[aria-sort=descending]").inner_text().startswith("bytes/param")


# ---- colours and widths ----------------------------------------------------------------------------------------------


def backgrounds(page: Any) -> tuple[str, str]:
    ink = page.evaluate("document.getElementById('plot-loss').layout.font.color")
    return page.evaluate("getComputedStyle(document.body).backgroundColor"), ink


def test_colours_follow_the_system_until_the_reader_chooses(browser: Any, address: str) -> None:
    with opened(browser, address, scheme="dark") as page:
        dark = backgrounds(page)
        page.emulate_media(color_scheme="light")
        page.wait_for_function("document.getElementById('plot-loss').layout.font.color === 'rgb(28, 33, 40)'")
        light = backgrounds(page)
        assert dark[0] != light[0]
        page.get_by_label("Colours").select_option("dark")
        assert backgrounds(page) == dark
    with opened(browser, address) as page:  # the choice is kept
        assert backgrounds(page) == dark
        page.get_by_label("Colours").select_option("")
        assert backgrounds(page) == light


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 1280])
def test_nothing_is_wider_than_the_screen(browser: Any, address: str, width: int, scheme: str) -> None:
    with opened(browser, address, width=width, scheme=scheme) as page:
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        for plot in page.locator(".plot svg.main-svg").all():
            box = plot.bounding_box()
            assert box["x"] >= 0
            assert box["x"] + box["width"] <= width
            assert box["width"] >= 0.8 * min(width, 500)
        if shots := os.environ.get("SCREENSHOTS"):
            page.screenshot(path=f"{shots}/page-{width}-{scheme}.png", full_page=True)


# ---- runs of any age and length --------------------------------------------------------------------------------------


def test_runs_of_any_age_are_shown_and_what_they_lack_is_said(
    browser: Any, run_writer: MakeRun, tmp_path: Path
) -> None:
    run_writer(tmp_path, "plus")
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "run.json").write_text("{}")
    with opened(browser, write_page(tmp_path)) as page:
        assert page.locator("#module").is_disabled()
        assert page.locator("#module-note").inner_text() == "(no figures by module in these runs)"
        assert "audit.jsonl" in note(page, "modules")
        assert "None of these runs" in note(page, "histogram")
        assert note(page, "loss").startswith("Not recorded for unknown")
        assert [name.split()[0] for name in traces(page, "loss")] == ["plus"]


def test_a_run_of_100000_records_makes_a_small_page_that_keeps_its_spike(
    browser: Any, run_writer: MakeRun, tmp_path: Path
) -> None:
    run = run_writer(tmp_path, "plus", steps=100_000, last=0)
    losses = (9.0 if step == 77_777 else 2.0 + step % 2 for step in range(1, 100_001))
    lines = (f'{{"step": {step}, "tokens": {step * 8}, "loss": {loss}}}\n' for step, loss in enumerate(losses, 1))
    (run / "metrics.jsonl").write_text("".join(lines))
    address = write_page(tmp_path)
    assert (tmp_path / "report.html").stat().st_size < 2_500_000
    with opened(browser, address) as page:
        page.get_by_label("Smoothing").fill("0")
        assert len(traces(page, "loss")["plus"]["x"]) <= 800
        assert traces(page, "loss")["plus"]["x"][-1] == 100_000
        assert max(traces(page, "loss", "run")["plus-seed0"]["y"]) == 9.0
        assert "Long runs are shortened" in note(page, "loss")


# ---- following -------------------------------------------------------------------------------------------------------


@contextmanager
def served(folder: Path) -> Iterator[tuple[str, Any]]:
    """The address of the page that follows `folder`, and its server."""
    server = watch.serve([folder], 0)
    thread = Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/", server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def test_a_page_that_is_watched_shows_new_records_and_runs_and_keeps_its_switches(
    browser: Any, run_writer: MakeRun, tmp_path: Path
) -> None:
    with served(tmp_path) as (address, _), opened(browser, address) as page:
        assert page.title() == "Waiting for runs"
        assert page.locator("#controls").is_hidden()
        run = run_writer(tmp_path, "plus", status="running", final=None, last=20, audited=True)
        run_writer(tmp_path, "plain", status="running", final=None, last=20, audited=True)
        page.wait_for_function("document.getElementById('plot-loss').data?.length === 4")
        page.get_by_label("plain", exact=True).uncheck()
        page.locator("#module").select_option("head")
        page.evaluate("window.kept = true")

        with (run / "metrics.jsonl").open("a") as file:
            file.write(json.dumps({"step": 21, "tokens": 2048 * 21, "loss": 1.25, "edq_ratio": 1.0}) + "\n")
        page.wait_for_function("document.getElementById('plot-loss').data.at(-1).x.at(-1) === 21")
        assert traces(page, "loss", "run")["plus-seed0"]["y"][-1] == 1.25
        assert set(traces(page, "loss")) == {"plus"}
        assert page.locator("#module").input_value() == "head"
        assert page.evaluate("window.kept") is True
        page.wait_for_function("document.getElementById('live').textContent.includes('plus-seed0 step 21 of 60')")

        run_writer(tmp_path, "mixed", audited=True)
        page.wait_for_function("document.getElementById('plot-loss').data.some(trace => trace.meta.group === 'mixed')")
        assert set(traces(page, "loss")) == {"plus", "mixed"}
        assert "mixed" in page.locator("table.sortable").inner_text()


def test_a_page_whose_server_has_stopped_says_so_and_stays(browser: Any, run_writer: MakeRun, tmp_path: Path) -> None:
    run_writer(tmp_path, "plus")
    page = browser.new_page()
    page.set_default_timeout(MS)
    with served(tmp_path) as (address, _):
        page.goto(address)
        page.wait_for_function("document.getElementById('live').textContent === 'following; no run is running'")
    page.wait_for_function("document.getElementById('live').textContent.includes('has stopped')")
    assert set(traces(page, "loss")) == {"plus"}
    page.close()
