"""Every command line of the checkout, as typer's apps."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from importlib.util import find_spec
from typing import Any

import typer

import client.cli


def programs() -> Iterator[tuple[str, typer.Typer]]:
    """Each folder and its app; a benchmark is named `benchmarks NAME`. Without PyTorch the client's alone."""
    yield "client", client.cli.app
    if find_spec("torch") is None:
        return
    import demo.screenshots
    import server.__main__
    from benchmarks.__main__ import BENCHMARKS
    from export.cli import app as export
    from training.cli import app as training

    yield from (("export", export), ("training", training))
    yield "server", one_command(server.__main__.serve)
    yield "demo", one_command(demo.screenshots.screenshots)
    for name in BENCHMARKS:
        module = importlib.import_module(f"benchmarks.{name.replace('-', '_')}")
        yield f"benchmarks {name}", one_command(module.main)


def commands(app: typer.Typer) -> dict[str, Any]:
    """The commands of an app by name; an app of one command has it under the name `""`."""
    group: Any = typer.main.get_command(app)
    if not hasattr(group, "list_commands"):
        return {"": group}
    context = typer.Context(group)
    return {name: group.get_command(context, name) for name in group.list_commands(context)}


def one_command(function: Any) -> typer.Typer:
    """An app of a single command."""
    app = typer.Typer()
    app.command()(function)
    return app
