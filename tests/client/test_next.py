"""The command that a command names as the next one can be typed as it stands."""

from __future__ import annotations

from pathlib import Path

import pytest

from client.commands.attribute import _viewed
from client.commands.display import say_next
from client.triton.endpoint import Endpoint


def test_the_server_is_named_where_it_has_to_be(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TRITON_URL", raising=False)
    say_next("view", Path("my results"), endpoint=Endpoint())
    say_next("view", "out", endpoint=Endpoint("gpu:9001"))
    monkeypatch.setenv("TRITON_URL", "gpu:9001")
    say_next("view", "out", endpoint=Endpoint("gpu:9001"))
    assert capsys.readouterr().out.splitlines() == [
        "next: gigapath-client view 'my results'",
        "next: gigapath-client view out --url gpu:9001",
        "next: gigapath-client view out",
    ]


@pytest.mark.parametrize(
    ("source", "out", "viewed"),
    [
        ("results", None, "results"),
        ("results/20x/features_demo/a.h5", None, "results"),
        ("results/demo-1/slide_features_demo/a.h5", None, "results"),
        ("out/a.h5", None, "out"),
        ("clam/a.h5", "mine", "mine"),
        ("a.svs", None, "out"),
    ],
)
def test_a_slide_that_was_attributed_is_found_by_view(
    source: str, out: str | None, viewed: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "results").mkdir()
    assert _viewed(Path(source), Path(out) if out else None).absolute() == tmp_path / viewed


def test_what_was_made_of_another_tool_s_file_is_not_beside_it() -> None:
    theirs = Path("job/20x_256px_0px_overlap/features_gigapath/a.h5")
    for source, out in ((theirs, None), (theirs.parent.parent, None), (theirs, Path("mine"))):
        assert _viewed(source, out, foreign=True) == (out or Path("out"))
