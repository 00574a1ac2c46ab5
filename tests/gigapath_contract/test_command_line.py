"""A user's mistake is one line and exit code 1, in every command line."""

from __future__ import annotations

import re
import sys
from typing import Annotated

import pytest
import typer

from gigapath_contract.command_line import call, run


class Mistake(Exception):
    pass


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (Mistake("two\nlines"), "error: two lines\n"),
        (FileNotFoundError(2, "No such file", "a.csv"), "error: a.csv: No such file: check the path, "),
        (OSError("no file is named"), "error: no file is named\n"),
    ],
)
def test_an_expected_error_is_one_line(
    error: Exception, line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    def command() -> None:
        raise error

    with pytest.raises(SystemExit) as ended:
        run(command, Mistake)
    printed = capsys.readouterr()
    assert (ended.value.code, printed.out, printed.err.count("\n")) == (1, "", 1)
    assert printed.err.startswith(line)


def test_another_error_and_an_exit_code_pass() -> None:
    def crash() -> None:
        raise KeyError("a fault of ours")

    def leave() -> None:
        raise SystemExit(3)

    with pytest.raises(KeyError):
        run(crash, Mistake)
    with pytest.raises(SystemExit, match="3"):
        run(leave, Mistake)


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--count", "0"], "Invalid value for '--count': .* See prog --help"),
        (["--count", "x"], "Invalid value for '--count': .* See prog --help"),
        (["--cuont", "1"], "No such option: --cuont .* See prog --help"),
        (["--count", "1", "more"], "Got unexpected extra argument.* See prog --help"),
        (["--count", "5"], "five is refused"),
    ],
)
def test_a_wrong_option_is_one_line_too(
    arguments: list[str], line: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    app = typer.Typer()

    @app.command()
    def command(count: Annotated[int, typer.Option(min=1)]) -> None:
        if count == 5:
            raise Mistake("five is refused")
        raise typer.Exit(count)

    monkeypatch.setattr(sys, "argv", ["prog", *arguments])
    with pytest.raises(SystemExit, match="1"):
        run(lambda: call(app, "prog"), Mistake)
    assert re.fullmatch(f"error: {line}\n", capsys.readouterr().err)
    monkeypatch.setattr(sys, "argv", ["prog", "--count", "3"])
    with pytest.raises(SystemExit, match="3"):
        run(lambda: call(app, "prog"), Mistake)
