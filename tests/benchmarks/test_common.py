"""Names of benchmarks and pages agree; trials alternate; a process's peak is its own."""

from __future__ import annotations

import re
import sys

import numpy as np
import pytest

from benchmarks.__main__ import BENCHMARKS, main
from benchmarks.common import PAGES, ROOT, alternate, in_own_process, median_ratio, peak_bytes, table


def test_every_benchmark_is_a_module_and_every_page_names_its_benchmark() -> None:
    for name in BENCHMARKS:
        assert (ROOT / "benchmarks" / f"{name.replace('-', '_')}.py").is_file()
    pages = {page.stem: page.read_text() for page in PAGES.glob("*.md")}
    named = {stem: re.search(r"make bench NAME=([a-z-]+)", text) for stem, text in pages.items()}
    assert {stem: match and match[1] for stem, match in named.items()} == {
        stem: "serving" if stem == "tuning" else stem for stem in pages
    }
    assert named.keys() - {"tuning"} <= BENCHMARKS.keys()


def test_without_a_name_all_are_listed_and_an_unknown_one_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["benchmarks"])
    main()
    listed = capsys.readouterr().out
    assert all(f"\n  {name} " in listed for name in BENCHMARKS)
    monkeypatch.setattr(sys, "argv", ["benchmarks", "latency"])
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 1
    assert capsys.readouterr().err.startswith("error: no benchmark 'latency': choose from attribution, ")


def test_trials_alternate_and_are_compared_within_a_trial() -> None:
    calls: list[str] = []

    def call(name: str) -> float:
        calls.append(name)
        return float(len(calls))

    measured = alternate({"a": lambda: call("a"), "b": lambda: call("b")}, 3)
    assert calls == ["a", "b", "b", "a", "a", "b"]
    assert measured == {"a": [1.0, 4.0, 5.0], "b": [2.0, 3.0, 6.0]}
    assert median_ratio(measured["a"], measured["b"]) == 5 / 6


def test_a_process_reports_its_own_peak() -> None:
    ballast = np.ones(400 * 2**20 // 8)
    assert peak_bytes() > ballast.nbytes
    assert in_own_process(peak_bytes) < ballast.nbytes


def test_a_table_has_a_column_for_every_heading() -> None:
    assert table("| 1 thread", ["loop | 7"]) == "| | 1 thread |\n|---|---|\n| loop | 7 |"
