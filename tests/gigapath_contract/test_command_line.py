"""A user's mistake is one line and exit code 1, in every command line."""

from __future__ import annotations

import pytest

from gigapath_contract.command_line import run


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
