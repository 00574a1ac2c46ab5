"""The commands of a checkout after `make setup`, typed in another folder."""

from __future__ import annotations

import subprocess
import sysconfig
import venv
from pathlib import Path

import pytest

from training.cli import ROOT, _print_export


def test_commands_run_in_any_folder_whatever_lies_there(tmp_path: Path) -> None:
    environment = tmp_path / "venv"
    venv.create(environment, symlinks=True)
    (environment / ".ready").touch()
    packages = next(environment.glob("lib/python3.*/site-packages"))
    (packages / "installed.pth").write_text(sysconfig.get_path("purelib"))
    launcher = environment / "bin" / "gigapath-client"
    ready = ("-o", str(environment / ".ready"))
    subprocess.run(["make", "-s", *ready, f"VENV={environment}", str(launcher)], cwd=ROOT, check=True)
    (tmp_path / "client").mkdir()
    (tmp_path / "client" / "__init__.py").write_text("raise SystemExit('not ours')")
    for command in (
        [str(launcher), "--version"],
        [str(environment / "bin" / "python"), "-m", "training", "--help"],
    ):
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert "gigapath" in done.stdout or "finetune" in done.stdout


def test_the_export_that_follows_a_training_can_be_typed_where_it_ran(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    _print_export(Path("runs/own"))
    monkeypatch.chdir(tmp_path)
    _print_export(Path("runs/own"), "WEIGHTS=w")
    assert capsys.readouterr().out.splitlines() == [
        "next: make export CHECKPOINT=runs/own",
        f"next: make -C {ROOT} export CHECKPOINT={tmp_path / 'runs/own'} WEIGHTS=w",
    ]
