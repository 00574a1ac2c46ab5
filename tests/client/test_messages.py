"""Every option and command that a message of the client names exists."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
import typer

from client.cli import app

CLIENT = Path(__file__).resolve().parents[2] / "client"
COMMANDS = typer.main.get_command(app).commands  # type: ignore[attr-defined]
OPTIONS = {
    name for command in COMMANDS.values() for parameter in command.params for name in parameter.opts
} | {
    name for command in COMMANDS.values() for parameter in command.params for name in parameter.secondary_opts
}
ELSEWHERE = {"--help", "--version", "--verbose"}  # of the program itself
EXPORT = (CLIENT.parent / "export" / "cli.py").read_text(encoding="utf-8")


def texts(path: Path) -> list[str]:
    """Every text of a module, the parts of f-strings joined."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.JoinedStr):
            parts = [part.value if isinstance(part, ast.Constant) else "…" for part in node.values]
            found.append("".join(map(str, parts)))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            found.append(node.value)
    return found


@pytest.mark.parametrize("path", sorted(CLIENT.rglob("*.py")), ids=lambda path: str(path.relative_to(CLIENT)))
def test_what_messages_recommend_exists(path: Path) -> None:
    for text in texts(path):
        for option in re.findall(r"(?<![\w-])--[a-z][a-z_-]*[a-z]", text):
            of_export = option.removeprefix("--").replace("-", "_") + ":" in EXPORT
            assert option in OPTIONS | ELSEWHERE or of_export, (option, text)
        for command in re.findall(r"(?:gigapath-client|python -m client|\(client|`client) ([a-z]+)", text):
            assert command in COMMANDS, (command, text)
