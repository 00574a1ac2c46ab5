"""The cause that is found in a log of tritonserver."""

from __future__ import annotations

from pathlib import Path

from server.diagnosis import diagnose


def test_a_process_that_ended_while_it_loaded(tmp_path: Path) -> None:
    """Lines of a server on an H200, whose ONNX Runtime 1.31.1 ended."""
    log = tmp_path / "triton.log"
    reason = "Stub process 'slide_occlusion_0_0' is not healthy."
    log.write_text(
        f'E1127 14:34:15.568336 4471 backend_model.cc:692] "ERROR: Failed to create instance: {reason}"\n'
        "E1127 14:34:15.568483 4471 model_lifecycle.cc:642] "
        f"\"failed to load 'slide_occlusion' version 1: Internal: {reason}\"\n"
    )
    assert diagnose(log, 1) == (
        "model 'slide_occlusion': its process ended while it loaded the graph: export again, an earlier "
        f"version's graphs end ONNX Runtime 1.31 on a GPU (log: {log})"
    )
