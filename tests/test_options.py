"""Every number and path that a command line takes: a senseless one is refused in one line, at once."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import typer
from typer.testing import CliRunner

from client.errors import ClientError
from export.errors import ExportError
from server.errors import ServerError
from tests.support.programs import commands, programs
from tests.support.pyramid import write_pyramid
from training.errors import TrainingError

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
    needed = [__file__ for p in params if p.param_type_name == "argument" and p.required]
    needed += [
        part for p in params if p.param_type_name == "option" and p.required for part in (p.opts[0], __file__)
    ]
    arguments = [*([command] if command else []), *needed, f"{option}={value}"]
    done = CliRunner().invoke(app, arguments, env={"TERM": "dumb", "COLUMNS": "200"})
    said = f"{done.output} {done.exception}"
    assert isinstance(done.exception, SystemExit | ClientError | ServerError), done.exc_info
    assert done.exit_code in (1, 2)
    assert option in said, said


NOWHERE = "/dev/null/x"  # can neither be read nor made
LATER = {  # what is looked at first, or what the path is for: another mistake, or a look at the machine
    "client view out",
    "client view --export",
    "export engines --repository",
    "training finetune --features",
    "training init-recipe --features",
    "training init-recipe --out",
    "training finetune --splits",
    "training tiles --data",
}


def paths() -> Iterator[tuple[str, str, Any, typer.Typer]]:
    """Program, command and parameter of every path."""
    for program, app in programs():
        if program in ("client", "export", "training"):
            for command, one in commands(app).items():
                for parameter in one.params:
                    if "Path" in str(parameter.bare_type()):
                        name = f"{program} {command} {parameter.opts[0]}"
                        if name not in LATER:
                            yield name, command, parameter, app


PATHS = {name: rest for name, *rest in paths()}


@pytest.mark.parametrize("name", PATHS)
def test_a_path_that_cannot_be_is_named_before_the_work(name: str, tmp_path: Path) -> None:
    """No server is asked: there is none."""
    command, wrong, app = PATHS[name]
    slide = write_pyramid(tmp_path / "slide.tif", np.full((256, 256, 3), 200, np.uint8))
    configs = Path(__file__).resolve().parents[1] / "training" / "configs"
    valid = {
        "--config": configs / ("demo-tiles.yaml" if command == "tiles" else "demo-slides.yaml"),
        "--out": tmp_path / "out",
        "version": 1,
    }
    arguments, given = [command], {wrong.opts[0]: NOWHERE}
    if wrong.opts[0] in ("--tls-cert", "--tls-key"):
        given = {"--tls-cert": NOWHERE, "--tls-key": NOWHERE}
    for parameter in commands(app)[command].params:
        option = parameter.opts[0]
        value = given.get(option, valid.get(option, slide) if parameter.required else None)
        if option == "--url":
            value = "127.0.0.1:1"
        if value is not None:
            arguments += [value] if parameter.param_type_name == "argument" else [option, value]
    done = CliRunner().invoke(app, list(map(str, arguments)), env={"TERM": "dumb", "COLUMNS": "500"})
    assert isinstance(done.exception, SystemExit | ClientError | ExportError | TrainingError), done.exc_info
    said = f"{done.output} {done.exception}"
    assert "/dev/null" in said, said
