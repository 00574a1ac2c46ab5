"""Find in tritonserver's log why it ended."""

from __future__ import annotations

import re
from pathlib import Path

# The wording of `backends/onnxruntime/heartbeat.py`, then Triton's own, the more specific first; what follows
# a model's reason is the backend's stack.
CAUSES = [
    (r"^model '(?P<model>.+?)': its process (?P<process>\d+) died",
     "model '{model}': its process {process} died"),
    (r"Stub process '(?P<model>.+)_\d+_\d+' is not healthy",
     "model '{model}': its process ended while it loaded the graph: export again, an earlier version's "
     "graphs end ONNX Runtime 1.31 on a GPU"),
    (r"failed to load '(?P<model>.+?)' version \d+: (?:Internal: )?(?P<reason>.+?)(?:\\n\\nAt:|\"?$)",
     "model '{model}' failed to load: {reason}"),
    (r"Poll failed for model directory '(?P<model>.+?)': (?P<reason>.+?)\"?$",
     "model '{model}' has no usable configuration: {reason}"),
    (r"Invalid argument: (?P<reason>ensemble .+?)\"?$", "{reason}"),
    (r"(?P<reason>unrecognized option '.+?')", "tritonserver: {reason}"),
    (r"failed to start (?P<service>\w+) service: \w+ - (?P<reason>.+?)\s*\"?$",
     "{service} did not start: {reason}"),
]  # fmt: skip


def diagnose(log: Path, code: int) -> str:
    """One line with the cause, the model if any, and the log; `code` is the server's exit code."""
    lines = log.read_text(errors="replace").splitlines()
    for pattern, sentence in CAUSES:
        for line in lines:
            found = re.search(pattern, line)
            if found:
                return f"{sentence.format(**found.groupdict())} (log: {log})"
    last = next((line for line in reversed(lines) if line.strip()), "its log is empty")
    return f"tritonserver ended with code {code}: {last} (log: {log})"
