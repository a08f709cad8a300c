"""Progress on a terminal, in a log file, and nowhere."""

from __future__ import annotations

import io

from rich.console import Console

from tunekit.progress import OnScreen, Silent


def written(terminal: bool, total: int = 20) -> str:
    text = io.StringIO()
    console = Console(file=text, force_terminal=terminal, width=160, highlight=False)
    screen = OnScreen(console)
    screen.note("chose [this]")
    with screen.stage("training", total) as tick:
        for step in range(total):
            tick(f"loss {step}")
            if step == 3:
                with screen.stage("drawing", 1) as inner:
                    inner("a zorp")
    return text.getvalue()


def test_a_log_file_gets_ten_lines_a_stage() -> None:
    lines = written(terminal=False).splitlines()
    assert lines[0] == "chose [this]"
    assert sum(line.startswith("training") for line in lines) == 10
    assert lines[-1].startswith("training 20/20, loss 19, ")
    assert any(line.startswith("drawing 1/1, a zorp") for line in lines)
    assert "s left" in lines[1]


def test_a_long_note_stays_one_line_in_a_log_file() -> None:
    text = io.StringIO()
    OnScreen(Console(file=text, width=80)).note("a long remark " * 20)
    assert text.getvalue().count("\n") == 1


def test_few_things_get_a_line_each() -> None:
    assert sum(line.startswith("training") for line in written(False, 5).splitlines()) == 5


def test_a_terminal_gets_a_bar() -> None:
    text = written(terminal=True)
    assert "training" in text
    assert "loss 19" in text
    assert "20/20" in text


def test_silence() -> None:
    silent = Silent()
    silent.note("nothing")
    with silent.stage("x", 1) as tick:
        tick("y")
