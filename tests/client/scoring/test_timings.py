"""The timer: what it adds up, and which stage it blames."""

from __future__ import annotations

import pytest

from client.scoring.timings import StageTimer, bottleneck, shares, total


def stages(**seconds: float) -> dict[str, dict[str, float]]:
    timer = StageTimer()
    for name, value in seconds.items():
        timer.add(name.replace("_", "-"), value, 10)
    return timer.as_dict()


@pytest.mark.parametrize(
    ("seconds", "blamed"),
    [
        ({"tissue": 5, "wait_server": 1}, "finding tissue (83% of the time)"),
        ({"wait_read": 5, "wait_server": 1}, "reading tiles"),
        (
            {"wait_server": 9, "wait_read": 1, "compute": 9, "send": 2},
            "encoder on the server (90% of the time, encoder busy 90%)",
        ),
        ({"wait_server": 9, "wait_read": 1, "compute": 2, "send": 30}, "carrying requests"),
        ({"wait_server": 9, "send": 9}, "statistics are not readable"),
        ({"write": 3, "open": 1}, "writing outputs"),
    ],
)
def test_the_bottleneck(seconds: dict[str, float], blamed: str) -> None:
    assert blamed in bottleneck(stages(**seconds), 10)


def test_how_busy_the_encoder_was_is_a_share_of_the_clock_and_not_of_slides_side_by_side() -> None:
    eight = stages(wait_server=72, wait_read=8, compute=9, send=2)  # slides at a time, in 10 seconds
    assert "(90% of the time, encoder busy 90%)" in bottleneck(eight, 10)
    assert "on the server (90% of the time):" in bottleneck(eight)


def test_no_bottleneck_is_named_where_little_was_done() -> None:
    brief = stages(tissue=2, wait_read=1, read=100)
    assert bottleneck(brief, at_least=10) == bottleneck({}, at_least=10) == ""
    assert "more slides at a time" in bottleneck(stages(tissue=10), at_least=10)


def test_sums() -> None:
    one, two = stages(open=1, write=2), stages(open=3)
    assert total([one, two]) == {
        "open": {"seconds": 4, "bytes": 20, "calls": 2},
        "write": {"seconds": 2, "bytes": 10, "calls": 1},
    }
    timer, other = StageTimer(), StageTimer()
    with timer.time("open", 5):
        pass
    other.add("open", 1.5, 7)
    timer.merge(other)
    assert timer.seconds("open") >= 1.5
    assert (timer.stages["open"].bytes, timer.stages["open"].calls) == (12, 2)


def test_the_shares_of_all_the_time_add_up() -> None:
    found = shares(stages(open=1, wait_server=6, compute=9, write=2), 10.0)
    assert found == {"open": (1, 0.1), "wait-server": (6, 0.6), "write": (2, 0.2), "rest": (1, 0.1)}


def test_a_record_that_lacks_a_figure_counts_as_none_of_it() -> None:
    assert total([{"read": {"seconds": 1.5}}, {"read": {"seconds": 1.0, "bytes": 2.0, "calls": 1.0}}]) == {
        "read": {"seconds": 2.5, "bytes": 2.0, "calls": 1.0}
    }
