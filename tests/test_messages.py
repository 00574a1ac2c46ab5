"""Every remedy that a message names exists: an option, a command, make's target, a benchmark, a group."""

from __future__ import annotations

import ast
import re
import tomllib
from pathlib import Path

import pytest

from tests.support.programs import commands, programs

ROOT = Path(__file__).resolve().parents[1]
PROGRAMS = {
    "client": "client export training",
    "gigapath_contract": "client training",
    "training": "training export client",
    "export": "export training",
    "server": "server client",
    "benchmarks": "benchmarks export client server",
    "demo": "demo export client training",
}
"""The programs whose options and commands the messages of a folder may name."""
ELSEWHERE = {
    "--help",
    "--version",
    "--verbose",
    "--group",  # of uv
    "--model-config-name",  # of tritonserver, as is the next
    "--log-verbose",
}
TARGETS = set(re.findall(r"^([a-z][a-z-]*):", (ROOT / "Makefile").read_text(), re.MULTILINE))
GROUPS = tomllib.loads((ROOT / "pyproject.toml").read_text())["dependency-groups"]
MODULES = [path for room in PROGRAMS for path in sorted((ROOT / room).rglob("*.py"))]


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


OPTIONS: dict[str, set[str]] = {}
COMMANDS: dict[str, set[str]] = {}
for name, app in programs():
    program = name.split()[0]
    for command, one in commands(app).items():
        COMMANDS.setdefault(program, set()).add(command or name.removeprefix("benchmarks").strip())
        for parameter in one.params:
            OPTIONS.setdefault(program, set()).update([*parameter.opts, *parameter.secondary_opts])
# The front's are argparse's.
FRONT = {text for text in texts(ROOT / "server" / "front" / "__main__.py") if text.startswith("--")}
OPTIONS.setdefault("server", set()).update(FRONT)


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_what_messages_recommend_exists(path: Path) -> None:
    room = path.relative_to(ROOT).parts[0]
    if room not in COMMANDS and room != "gigapath_contract":
        pytest.skip("needs PyTorch: make setup ROOMS=all")
    known = ELSEWHERE.union(*(OPTIONS.get(program, ()) for program in PROGRAMS[room].split()))
    for text in texts(path):
        of_a_message = text if " " in text.strip() else ""  # else it may be an argument for another program
        for option in re.findall(r"(?<![\w-])--[a-z][a-z_-]*[a-z]", of_a_message):
            assert option in known or "export" not in OPTIONS, (option, text)
        for command in re.findall(r"(?:gigapath-client|\(client|`client) ([a-z]+)", text):
            assert command in COMMANDS["client"], (command, text)
        for program, command in re.findall(r"python -m (client|training|export) ([a-z-]+)", text):
            assert command in COMMANDS.get(program, {command}), (program, command, text)
        for target in re.findall(r"(?:`|\(|run |Example: )make ([a-z][a-z-]*)", text):
            assert target in TARGETS, (target, text)
        for benchmark in re.findall(r"make bench NAME=([a-z][a-z-]*)", text):
            assert benchmark in COMMANDS.get("benchmarks", {benchmark}), (benchmark, text)
        for group in re.findall(r"--group ([a-z][a-z-]*)", text):
            assert group in GROUPS, (group, text)
