"""Every number that a command line takes: a senseless one is refused by the name of its option, at once."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import typer
from typer.testing import CliRunner

from client.errors import ClientError
from server.errors import ServerError
from tests.support.programs import commands, programs

torch = pytest.importorskip("torch", reason="training and export need PyTorch: make setup ROOMS=all")

SIGNED = {"--seed"}  # of a benchmark: any whole number does


def numbers() -> Iterator[tuple[str, str, str, str, typer.Typer]]:
    """Program, command, option and senseless value of every numeric option."""
    for program, app in programs():
        for command, one in commands(app).items():
            for parameter in one.params:
                kind = parameter.bare_type()
                if parameter.param_type_name == "option" and kind in ("int", "float"):
                    option = parameter.opts[0]
                    if kind == "float":
                        senseless = ["nan", "inf", "-inf"]
                    else:
                        senseless = [] if program.startswith("bench") and option in SIGNED else ["-1", "1.5"]
                    yield from ((program, command, option, value, app) for value in senseless)


ALL = {" ".join(case[:4]): case for case in numbers()}


def test_there_are_some() -> None:
    assert {case[0].split()[0] for case in ALL.values()} == {
        "client",
        "export",
        "training",
        "server",
        "benchmarks",
    }
    assert len(ALL) > 100


@pytest.mark.parametrize("name", ALL)
def test_a_senseless_number_is_refused_by_the_option_s_name(name: str) -> None:
    _, command, option, value, app = ALL[name]
    params = commands(app)[command].params
    needed = ["x" for p in params if p.param_type_name == "argument" and p.required]
    needed += [
        part for p in params if p.param_type_name == "option" and p.required for part in (p.opts[0], "x")
    ]
    arguments = [*([command] if command else []), *needed, f"{option}={value}"]
    done = CliRunner().invoke(app, arguments, env={"TERM": "dumb", "COLUMNS": "200"})
    said = f"{done.output} {done.exception}"
    assert isinstance(done.exception, SystemExit | ClientError | ServerError), done.exc_info
    assert done.exit_code in (1, 2)
    assert option in said, said
