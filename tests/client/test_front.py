"""A slide scored through a front that lets few requests through at a time is scored as without one."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.support.fronted import fronted


def test_a_slide_is_scored_to_the_byte_as_without_a_front(
    triton_url: str,
    demo_repository: Path,
    real_slide: Path,
    run_client: Callable[..., Any],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    options = ["--all-tiles", "--chunk", "8", "--in-flight", "8"]
    with fronted(triton_url, in_flight=2) as url, caplog.at_level(logging.INFO):
        for name, server in (("direct", triton_url), ("behind", url)):
            done = run_client("score", real_slide, "--url", server, "--out", tmp_path / name, *options)
            assert done.code == 0, done.err
        reference = demo_repository / "slide_pipeline" / "1" / "reference.npz"
        verified = run_client("verify", "--url", url, "--reference", reference)
        assert verified.code == 0, verified.err
    direct, behind = (
        {path.name: path.read_bytes() for path in (tmp_path / name).iterdir() if path.is_file()}
        for name in ("direct", "behind")
    )
    assert direct == behind
    assert any(name.endswith(".h5") for name in direct)
    assert "has 2 requests in flight" in caplog.text
