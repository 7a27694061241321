from __future__ import annotations

import pytest

from collage.train.display import Display, conversion_text


def record(step: int, **more: float | None) -> dict[str, object]:
    return {"step": step, "loss": 2.5, "tokens_per_s": 1234.0, **more}


def test_away_from_a_terminal_some_steps_and_every_validation_leave_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    with Display("plus-seed0", steps=100, start=0, enabled=True) as display:
        for step in range(1, 101):
            display.show(record(step, **({"validation_loss": 3.0} if step == 51 else {})))
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 21
    assert "step 51/100  validation loss 3.0000" in lines
    assert lines[-1] == "step 100/100  loss 2.5000  1,234 tokens/s"


def test_the_last_known_edq_ratio_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    with Display("plus-seed0", steps=2, start=0, enabled=True) as display:
        display.show(record(1, edq_ratio=0.5))
        display.show(record(2))
    assert capsys.readouterr().out.splitlines()[-1].endswith("EDQ ratio 0.500")


def test_other_processes_show_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with Display("plus-seed0", steps=2, start=0, enabled=False) as display:
        display.say("hello")
        display.show(record(2))
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(("error", "said"), [(0.0, "exact"), (0.00391, "3.9e-03"), (1.2e-7, "1.2e-07"), (None, "–")])
def test_a_conversions_error_is_exact_or_a_share(error: float | None, said: str) -> None:
    assert conversion_text(error) == said
