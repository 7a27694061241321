"""What is said of a row: cells and sentences."""

from __future__ import annotations

from typing import Any

import pytest

from collage.report.wording import (
    COLUMNS,
    MISSING,
    cells,
    learning_rates,
    megabytes,
    percent,
    plain,
    signed,
    verdict,
    with_spread,
)


def row(**changes: Any) -> dict[str, Any]:
    figures: dict[str, Any] = {
        "label": "plus",
        "strategy": "plus",
        "seeds": 3,
        "train_loss": 2.0,
        "validation_loss": 2.1,
        "validation_loss_spread": 0.01,
        "validation_losses": [2.09, 2.1, 2.11],
        "perplexity": 8.166,
        "edq_ratio": 1.0,
        "lost_fraction": 0.0,
        "lost_fraction_hi": 0.77,
        "v_lost_fraction": 0.0,
        "bytes_per_param": 12.0,
        "state_bytes": 6_870_000,
        "peak_memory_bytes": 512_000_000,
        "tokens_per_s": 5000.0,
        "difference_from_mixed": {"mean": 0.001, "spread": 0.002, "seeds": [0, 1, 2], "values": []},
        "unfinished": [],
    }
    return {**figures, **changes}


def cell(heading: str, **changes: Any) -> str:
    return dict(zip([column.heading for column in COLUMNS], cells(row(**changes)), strict=True))[heading]


@pytest.mark.parametrize(
    ("share", "text"),
    [
        (None, MISSING),
        (0.0, "0"),
        (1.0, "100.0"),
        (0.834, "83.4"),
        (0.0096, "1.0"),
        (0.0094, "0.94"),
        (0.0012, "0.12"),
        (1e-6, "< 0.01"),
    ],
)
def test_a_share_is_written_as_a_percentage_that_is_never_rounded_to_nothing(share: float | None, text: str) -> None:
    assert percent(share) == text


@pytest.mark.parametrize(
    ("value", "spread", "text"),
    [(0.04668, 0.0035, "+0.0467 ± 0.0035"), (-0.04668, None, "-0.0467"), (0.00001, 0.0001, "0 ± 0.0001")],
)
def test_a_difference_has_a_sign_unless_it_rounds_to_zero(value: float, spread: float | None, text: str) -> None:
    assert signed(value, spread) == text


def test_a_negative_difference_that_rounds_to_zero_has_no_sign() -> None:
    assert signed(-0.00001, None) == "0"


def test_what_is_missing_is_a_dash() -> None:
    assert plain(None) == with_spread(None, 0.1) == megabytes(None) == MISSING


def test_megabytes_are_millions() -> None:
    assert megabytes(6_870_000) == "6.87"
    assert megabytes(1_512_000_000) == "1,512"


@pytest.mark.parametrize(
    ("heading", "text"),
    [
        ("strategy", "plus"),
        ("validation loss", "2.1000 ± 0.0100"),
        ("minus mixed", "+0.0010 ± 0.0020"),
        ("perplexity", "8.166"),
        ("EDQ ratio", "1.0000"),
        ("lost updates %", "0"),
        ("lost, hi %", "77.0"),
        ("lost v %", "0"),
        ("bytes/param", "12"),
        ("state MB", "6.87"),
        ("peak MB", "512"),
        ("tokens/s", "5,000"),
    ],
)
def test_each_figure_stands_under_its_heading(heading: str, text: str) -> None:
    assert cell(heading) == text


def test_every_column_has_a_heading_of_its_own_and_an_explanation() -> None:
    assert len({column.heading for column in COLUMNS}) == len(COLUMNS) == 12
    assert all(column.explanation.endswith(".") for column in COLUMNS)


def test_with_one_seed_there_is_no_spread() -> None:
    assert cell("validation loss", validation_loss_spread=None) == "2.1000"
    one = {"mean": 0.001, "spread": None, "seeds": [0], "values": [0.001]}
    assert cell("minus mixed", difference_from_mixed=one) == "+0.0010"


def test_the_difference_is_zero_for_the_baseline_and_a_dash_without_one() -> None:
    assert cell("minus mixed", strategy="mixed", difference_from_mixed=None) == "0"
    assert cell("minus mixed", difference_from_mixed=None) == MISSING


def test_cells_of_a_row_without_figures_are_dashes() -> None:
    figures = [key for key in row() if key not in ("label", "strategy", "unfinished")]
    assert cells(row(**dict.fromkeys(figures)))[1:] == [MISSING] * 11


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (
            {"difference_from_mixed": {"mean": -3e-5, "spread": 1e-5, "seeds": [0, 1, 2]}},
            "plus: no updates were lost in the last tenth of the run; validation loss that of mixed to four digits "
            "(± 0.0000 over 3 seeds).",
        ),
        (
            {},
            "plus: no updates were lost in the last tenth of the run; validation loss equal to mixed within the spread "
            "over 3 seeds (+0.0010 ± 0.0020).",
        ),
        (
            {
                "label": "plain",
                "strategy": "plain",
                "edq_ratio": 0.38,
                "lost_fraction": 0.849,
                "v_lost_fraction": 0.65,
                "difference_from_mixed": {"mean": 0.0467, "spread": 0.0035, "seeds": [0, 1, 2]},
            },
            "plain: 84.9 % of updates were lost in the last tenth of the run, and the weights went 38.0 % of the "
            "intended way; v stood still in 65.0 % of its entries; validation loss 0.0467 above mixed (± 0.0035 over 3 "
            "seeds).",
        ),
        (
            {"difference_from_mixed": {"mean": -0.0467, "spread": None, "seeds": [0]}},
            "plus: no updates were lost in the last tenth of the run; validation loss 0.0467 below mixed (one seed, so "
            "without a spread).",
        ),
        (
            {"difference_from_mixed": None},
            "plus: no updates were lost in the last tenth of the run; validation loss 2.1000 (no mixed run to set it "
            "against).",
        ),
        (
            {"edq_ratio": None, "lost_fraction": None, "difference_from_mixed": None},
            "plus: no update was measured in the last tenth of the run; validation loss 2.1000 (no mixed run to set it "
            "against).",
        ),
        (
            {"label": "mixed", "strategy": "mixed", "difference_from_mixed": None},
            "mixed: no updates were lost in the last tenth of the run; the others are measured against it.",
        ),
        (
            {"seeds": 2, "validation_losses": [2.0, None], "validation_loss": None},
            "plus: the validation loss is not a finite number in 1 of 2 runs.",
        ),
        (
            {
                "seeds": 0,
                "validation_losses": [],
                "validation_loss": None,
                "unfinished": [{"name": "plus-seed0", "status": "failed", "step": 7, "steps": 60}],
            },
            "plus: no run finished (plus-seed0 failed at step 7).",
        ),
    ],
)
def test_the_sentence_says_what_the_figures_say(changes: dict[str, Any], sentence: str) -> None:
    assert verdict(row(**changes)) == sentence


def test_the_sentence_ends_with_the_runs_that_are_missing() -> None:
    left = [{"name": f"plus-seed{seed}", "status": "failed", "step": 7, "steps": 60} for seed in (3, 4)]
    assert verdict(row(unfinished=left[:1])).endswith(". 1 more run did not finish.")
    assert verdict(row(unfinished=left)).endswith(". 2 more runs did not finish.")


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"lr": 1e-4, "min_lr": 1e-5, "schedule": "cosine"}, "learning rate from 0.0001 down to 1e-05, cosine"),
        ({"lr": 1e-4, "min_lr": None, "schedule": "linear"}, "learning rate from 0.0001 down, linear"),
        ({"lr": 1e-4, "min_lr": 1e-5, "schedule": "constant"}, "learning rate 0.0001, constant"),
    ],
)
def test_the_learning_rate_in_words(config: dict[str, Any], said: str) -> None:
    assert learning_rates(config) == said
