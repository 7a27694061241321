"""What the plots show and say; how they look is judged by eye."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text

from collage.optim.strategies import strategies
from collage.report.groups import Group, group_runs
from collage.report.plots import PLOTS, render, theme_settings
from collage.report.runs import read_runs
from collage.report.stats import group_curve
from collage.report.style import DARK, LIGHT, Theme, lines

MakeRun = Callable[..., Path]
PNG = b"\x89PNG\r\n\x1a\n"
STEMS = [plot.stem for plot in PLOTS]


@pytest.fixture
def groups(make_run: MakeRun, tmp_path: Path) -> list[Group]:
    for strategy in ("plain", "light", "plus", "mixed"):
        for seed in (0, 1, 2):
            make_run(strategy, seed)
    return group_runs(read_runs([tmp_path / "runs"]))


def drawn(stem: str, groups: list[Group], theme: Theme = LIGHT) -> Figure | None:
    (plot,) = (plot for plot in PLOTS if plot.stem == stem)
    with rc_context(theme_settings(theme)):
        figure = plot.draw(list(zip(groups, lines(groups, theme), strict=True)), theme)
        if figure is not None:
            FigureCanvasAgg(figure).draw()
    return figure


def texts(figure: Figure) -> list[str]:
    return [text.get_text() for text in visible_texts(figure)]


def visible_texts(figure: Figure) -> list[Text]:
    found = [text for text in figure.findobj(Text) if isinstance(text, Text) and text.get_visible()]
    return [text for text in found if text.get_text().strip() and not _off_axis(text, figure.axes)]


def _off_axis(text: Text, all_axes: Iterable[Axes]) -> bool:
    """Whether it is the label of a tick outside the axis's range, which matplotlib makes but doesn't draw."""
    for axes in all_axes:
        for axis in (axes.xaxis, axes.yaxis):
            low, high = sorted(axis.get_view_interval())
            for tick in axis.get_major_ticks():
                if text in (tick.label1, tick.label2):
                    return not low - 1e-9 <= tick.get_loc() <= high + 1e-9
    return False


@pytest.mark.parametrize(
    ("stem", "labels"),
    [
        ("loss", ["training loss\n(nats per token)", "training loss\nminus mixed", "optimizer step"]),
        ("updates", ["EDQ ratio\n(1 = nothing lost)", "lost updates\n(% of weights)", "optimizer step"]),
        ("validation", ["validation loss minus mixed (nats per token); below: enlarged"]),
        ("memory", ["bytes per parameter", "weight", "gradient", "m", "v", "low parts, master copy"]),
    ],
)
def test_axes_are_labelled_with_their_units(groups: list[Group], stem: str, labels: list[str]) -> None:
    figure = drawn(stem, groups)
    assert figure is not None
    assert set(labels) <= set(texts(figure))


@pytest.mark.parametrize("stem", STEMS)
def test_every_strategy_is_named_in_every_plot(groups: list[Group], stem: str) -> None:
    figure = drawn(stem, groups)
    assert figure is not None
    # The baseline itself is the zero of the validation plot.
    wanted = ["plain", "light", "plus"] + ["mixed"] * (stem != "validation")
    assert set(wanted) <= set(texts(figure))


@pytest.mark.parametrize("theme", [LIGHT, DARK], ids=["light", "dark"])
@pytest.mark.parametrize("stem", STEMS)
def test_no_text_lies_on_another_and_none_is_cut_off(groups: list[Group], stem: str, theme: Theme) -> None:
    figure = drawn(stem, groups, theme)
    assert figure is not None
    boxes = [(text.get_text(), text.get_window_extent()) for text in visible_texts(figure)]
    for (first, one), (second, other) in combinations(boxes, 2):
        assert not one.padded(-1).overlaps(other.padded(-1)), (first, second)
    for text, box in boxes:
        assert box.x0 >= 0, text
        assert box.y0 >= 0, text
        assert box.x1 <= figure.bbox.x1, text
        assert box.y1 <= figure.bbox.y1, text


@pytest.mark.parametrize("theme", [LIGHT, DARK], ids=["light", "dark"])
@pytest.mark.parametrize("stem", STEMS)
def test_a_plot_is_a_png_of_twice_640_pixels_the_same_each_time(groups: list[Group], stem: str, theme: Theme) -> None:
    (plot,) = (plot for plot in PLOTS if plot.stem == stem)
    first = render(plot, groups, theme)
    assert first is not None
    assert first.startswith(PNG)
    assert int.from_bytes(first[16:20], "big") == 1280
    assert first == render(plot, groups, theme)


@pytest.mark.parametrize("theme", [LIGHT, DARK], ids=["light", "dark"])
def test_every_strategy_has_a_look_of_its_own(make_run: MakeRun, tmp_path: Path, theme: Theme) -> None:
    for strategy in strategies():
        make_run(strategy)
    looks = lines(group_runs(read_runs([tmp_path / "runs"])), theme)
    assert len({(look.colour, look.dashes, look.marker) for look in looks}) == len(looks) == len(strategies())


def test_the_baseline_is_the_widest_line_and_lies_undermost(groups: list[Group]) -> None:
    looks = dict(zip([group.strategy for group in groups], lines(groups, LIGHT), strict=True))
    assert looks["mixed"].width == max(look.width for look in looks.values())
    assert looks["mixed"].order == min(look.order for look in looks.values())
    assert looks["mixed"].dashes == "solid"
    assert len({look.dashes for look in looks.values()}) == 4


def test_the_band_of_the_loss_reaches_from_the_smallest_to_the_largest_seed(groups: list[Group]) -> None:
    figure, made = drawn("loss", groups[:1]), group_curve(groups[0], "loss")
    assert figure is not None
    assert made is not None
    (band,) = figure.axes[0].collections
    corners = {(x, round(y, 9)) for x, y in np.asarray(band.get_paths()[0].vertices)}
    low, high = made.smoothed().low, made.smoothed().high
    assert all(top > bottom for bottom, top in zip(low, high, strict=True))
    assert {(step, round(y, 9)) for line in (low, high) for step, y in zip(made.steps, line, strict=True)} <= corners


def test_one_seed_has_no_band(groups: list[Group]) -> None:
    figure = drawn("loss", [Group("plain", "plain", {}, groups[0].runs[:1])])
    assert figure is not None
    assert not figure.axes[0].collections


def test_the_raw_and_the_smoothed_loss_are_both_drawn(groups: list[Group]) -> None:
    figure = drawn("loss", groups[:1])
    assert figure is not None
    raw, smoothed = figure.axes[0].lines
    assert raw.get_linewidth() < 1.0 < smoothed.get_linewidth()
    assert np.std(np.diff(raw.get_ydata())) > np.std(np.diff(smoothed.get_ydata()))


def test_without_a_baseline_losses_are_drawn_as_they_are(groups: list[Group]) -> None:
    loss, validation = drawn("loss", groups[:3]), drawn("validation", groups[:3])
    assert loss is not None
    assert validation is not None
    assert len(loss.axes) == 1
    assert "validation loss (nats per token)" in texts(validation)


def test_differences_of_one_size_need_no_enlarged_panel(groups: list[Group]) -> None:
    figure = drawn("validation", groups[1:])
    assert figure is not None
    assert len(figure.axes) == 1


@pytest.mark.parametrize("stem", ["loss", "updates", "validation"])
def test_runs_without_a_record_make_no_plot(make_run: MakeRun, tmp_path: Path, stem: str) -> None:
    make_run("plus", final=None, last=0)
    assert drawn(stem, group_runs(read_runs([tmp_path / "runs"]))) is None


def test_figures_that_are_all_null_make_no_plot(make_run: MakeRun, tmp_path: Path) -> None:
    run = make_run("plus")
    (run / "metrics.jsonl").write_text('{"step": 1, "loss": null, "edq_ratio": null, "lost_fraction": null}\n')
    groups = group_runs(read_runs([tmp_path / "runs"]))
    assert drawn("loss", groups) is None
    assert drawn("updates", groups) is None


@pytest.mark.parametrize("stem", STEMS)
@pytest.mark.parametrize("steps", [1, 10])
def test_a_run_of_a_few_steps_is_drawn(make_run: MakeRun, tmp_path: Path, stem: str, steps: int) -> None:
    for strategy in ("plain", "mixed"):
        run = make_run(strategy, steps=steps)
        record = '{"step": %d, "loss": 3.0, "edq_ratio": 0.5, "lost_fraction": 0.5}\n'
        (run / "metrics.jsonl").write_text("".join(record % step for step in range(1, steps + 1)))
    assert drawn(stem, group_runs(read_runs([tmp_path / "runs"]))) is not None


def test_a_curve_with_a_gap_and_an_interrupted_run_is_drawn(make_run: MakeRun, tmp_path: Path) -> None:
    run = make_run("plus", status="interrupted", last=0)
    (run / "metrics.jsonl").write_text('{"step": 1, "loss": 3}\n{"step": 2, "loss": null}\n{"step": 3, "loss": 2}\n')
    assert drawn("loss", group_runs(read_runs([tmp_path / "runs"]))) is not None


def test_the_axis_of_steps_begins_at_zero_and_has_whole_numbers_even_for_one_step(
    make_run: MakeRun, tmp_path: Path
) -> None:
    run = make_run("plus", steps=10)
    (run / "metrics.jsonl").write_text('{"step": 10, "loss": 3.0, "edq_ratio": 0.5, "lost_fraction": 0.5}\n')
    figure = drawn("updates", group_runs(read_runs([tmp_path / "runs"])))
    assert figure is not None
    assert figure.axes[-1].get_xlim()[0] == 0
    assert all(tick == round(tick) for tick in figure.axes[-1].get_xticks())
