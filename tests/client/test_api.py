"""What `import client` offers a notebook."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

import client

ROOT = Path(__file__).resolve().parents[2]


def test_the_import_is_cheap_and_every_public_name_is_there() -> None:
    code = (
        "import sys, client\n"
        "assert not {'numpy', 'openslide', 'grpc'} & set(sys.modules)\n"
        "values = [getattr(client, name) for name in client.__all__]\n"
        "assert all(value.__doc__ for value in values)\n"
        "assert set(client.__all__) <= set(dir(client))\n"
        "import client.cli\n"
        "assert not {'torch', 'matplotlib'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = client.nothing


def test_a_command_does_not_wait_for_the_modules_of_others() -> None:
    code = (
        "import sys; sys.argv = ['client', 'batch', '--help']\n"
        "import client.cli\n"
        "try:\n    client.cli.main()\nexcept SystemExit:\n    assert 'client.commands.batch' in sys.modules\n"
        "assert 'client.commands.score' not in sys.modules\n"
        "assert not {'client.attribution', 'client.viewer', 'starlette'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_a_program_whose_first_word_is_a_command_imports_all_commands() -> None:
    code = (
        "import sys; sys.argv[1:] = ['score']\n"
        "import client.cli, typer.testing\n"
        "assert typer.testing.CliRunner().invoke(client.cli.app, ['doctor', '--help']).exit_code == 0\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_the_example_runs_and_is_the_one_of_the_documentation(
    real_slide: Path, triton_url: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert client.__doc__
    indented = [line for line in client.__doc__.splitlines() if line.startswith("    ") or not line]
    example = textwrap.dedent("\n".join(indented)).strip()
    assert f"```python\n{example}\n```" in (ROOT / "docs" / "client.md").read_text()
    here = {"gigapath_client": "client", "127.0.0.1:8001": triton_url, real_slide.name: str(real_slide)}
    for written, actual in here.items():
        assert written in example
        example = example.replace(written, actual)
    exec(example, {})
    out = capsys.readouterr().out
    assert " tiles [" in out
    assert "{" in out
