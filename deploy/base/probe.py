"""Does this Triton serve? Runs inside the server's container (standard library only), over HTTP on loopback.

`probe.py live` asks whether the process answers. `probe.py infer` sends one black tile through the whole
`slide_pipeline`: a server can report READY and still fail every request. A tile that waits behind other
requests counts as served while those get done. Where the variable GPU is `required`, a server that runs a
model on the CPU (Triton found no GPU, and says so in its log alone) does not serve. Exits 0 for yes, 1 for
no, with why.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import sys
import urllib.error
import urllib.request

TILE = bytes(224 * 224 * 3)
COORDS = bytes(2 * 8)
STEPS = ("tile_encoder", "slide_encoder")
GRAPHS = (*STEPS, "slide_occlusion")
COUNT = re.compile(r'nv_inference_(exec|pending_request)_count\{model="(\w+)",version="\d+"\} (\d+)')


def call(url: str, timeout: float, body: bytes | None = None, headers: dict[str, str] | None = None) -> bytes:
    """The body of one HTTP answer."""
    with urllib.request.urlopen(urllib.request.Request(url, body, headers or {}), timeout=timeout) as answer:
        content: bytes = answer.read()
        return content


def infer(url: str, timeout: float) -> None:
    """Raise OSError or ValueError unless a tile gives a finite slide embedding."""
    specs = [("TILES", "UINT8", [1, 224, 224, 3], TILE), ("COORDS", "INT64", [1, 2], COORDS)]
    header = json.dumps(
        {
            "inputs": [
                {"name": n, "datatype": t, "shape": s, "parameters": {"binary_data_size": len(data)}}
                for n, t, s, data in specs
            ],
            # An ensemble whose EMBEDDINGS aren't asked for hands none to its second step (server#7482).
            "outputs": [{"name": "SLIDE"}, {"name": "EMBEDDINGS"}],
        }
    ).encode()
    length = {"Inference-Header-Content-Length": str(len(header))}
    answer = call(f"{url}/v2/models/slide_pipeline/infer", timeout, header + TILE + COORDS, length)
    embedding = next(out["data"] for out in json.loads(answer)["outputs"] if out["name"] == "SLIDE")
    if not embedding or not all(math.isfinite(value) for value in embedding):
        raise ValueError("the slide embedding of a black tile is not finite")


def check_gpu(url: str, timeout: float) -> None:
    """Raise OSError or ValueError unless Triton runs every model on a GPU."""
    for model in GRAPHS:
        config = json.loads(call(f"{url}/v2/models/{model}/config", timeout))
        if any(group["kind"] != "KIND_GPU" for group in config["instance_group"]):
            raise ValueError(
                f"GPU is 'required' and {model} runs on the CPU: Triton's log says why it found no GPU"
            )


def counts(metrics_url: str, timeout: float) -> dict[str, dict[str, int]]:
    """By "exec" and "pending_request": what each step has run so far, and what waits for it."""
    found = {kind: dict.fromkeys(STEPS, 0) for kind in ("exec", "pending_request")}
    for kind, model, value in COUNT.findall(call(metrics_url, timeout).decode()):
        if model in STEPS:
            found[kind][model] += int(value)
    return found


def check(mode: str, url: str, metrics_url: str, timeout: float) -> None:
    """Raise OSError or ValueError, which say what is wrong, unless the server serves."""
    if mode == "live":
        call(f"{url}/v2/health/live", timeout)
        return
    if os.environ.get("GPU") == "required":
        check_gpu(url, timeout)
    before = counts(metrics_url, timeout)
    try:
        infer(url, timeout)
    except urllib.error.HTTPError as error:
        message = error.read().decode(errors="replace")
        if "maximum queue size" not in message:
            raise ValueError(message) from error
    except TimeoutError:
        # A queue delays the probe too. With none, it is the tile itself that hangs.
        after = counts(metrics_url, timeout)
        waiting = [step for step in STEPS if after["pending_request"][step]]
        stuck = [step for step in waiting if after["exec"][step] == before["exec"][step]]
        if stuck:
            message = f"{stuck[0]} did nothing in {timeout:g} s while requests wait for it"
            raise TimeoutError(message) from None
        if not waiting:
            raise


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("mode", choices=["live", "infer"])
    parser.add_argument("--url", default="http://127.0.0.1:8000", help="HTTP address (default: %(default)s)")
    metrics = "http://127.0.0.1:8002/metrics"
    parser.add_argument("--metrics-url", default=metrics, help="(default: %(default)s)")
    parser.add_argument("--timeout", type=float, default=20, help="seconds to wait (default: %(default)g)")
    arguments = parser.parse_args()
    try:
        check(arguments.mode, arguments.url, arguments.metrics_url, arguments.timeout)
    except (OSError, ValueError) as error:
        sys.exit(f"probe: {error}")


if __name__ == "__main__":
    main()
