"""Does this Triton serve? Runs inside the server's container (standard library only), over HTTP on loopback.

`probe.py live` asks whether the process answers. `probe.py infer` sends one tile through the whole
`slide_pipeline` and a small slide through `slide_encoder`: a server can report READY and still fail every
request, or compute wrong numbers. Inputs, true answers and gates are those of the served export's
`reference.npz` (`gigapath_contract/reference.py`). A tile that waits behind other requests counts as served
while those get done. Where the variable GPU is `required`, a server that runs a
model on the CPU (Triton found no GPU, and says so in its log alone) does not serve. Exits 0 for yes, 1 for
no, with why.
"""

from __future__ import annotations

import argparse
import ast
import json
import math
import os
import re
import struct
import sys
import time
import urllib.error
import urllib.request
import zipfile
from array import array
from collections.abc import Iterable, Sequence
from pathlib import Path

TILE_SHAPE = [1, 224, 224, 3]
BLACK = bytes(math.prod(TILE_SHAPE))
CODES = {"|u1": "B", "<f4": "f", "<f8": "d", "<i8": "q"}
Inputs = Sequence[tuple[str, str, list[int], bytes]]
"""Name, type, shape and data of each."""
STEPS = ("tile_encoder", "slide_encoder")
GRAPHS = (*STEPS, "slide_occlusion")
COUNT = re.compile(r'nv_inference_(exec|pending_request)_count\{model="(\w+)",version="\d+"\} (\d+)')


def call(url: str, timeout: float, body: bytes | None = None, headers: dict[str, str] | None = None) -> bytes:
    """The body of one HTTP answer."""
    with urllib.request.urlopen(urllib.request.Request(url, body, headers or {}), timeout=timeout) as answer:
        content: bytes = answer.read()
        return content


def infer(url: str, timeout: float, models: Path) -> None:
    """Raise OSError or ValueError unless a tile and a small slide give what they gave at the export."""
    deadline = time.monotonic() + timeout
    config = json.loads(call(f"{url}/v2/models/slide_encoder/config", timeout))
    contract = json.loads(config["parameters"]["contract"]["string_value"])
    path = models / "slide_pipeline" / str(contract["version"]) / "reference.npz"
    if not path.is_file():
        sys.stderr.write(f"probe: {path} is missing: the numbers are not compared\n")
        ask_pipeline(url, timeout, BLACK)
        return
    with zipfile.ZipFile(path) as reference:
        tile = read_array(reference, "tiles")[: len(BLACK)].tobytes()
        width = contract["tile_encoder"]["embed_dim"]
        widths = {"EMBEDDINGS": width}
        if "tile_head" in contract:
            widths["TILE_LOGITS"] = len(contract["tile_head"]["classes"])
        answer = ask_pipeline(url, timeout, tile, widths)
        for name, count in widths.items():
            true = read_array(reference, f"tile_encoder.{name}")[:count]
            compare(reference, "tile_encoder", name, answer[name], true)

        size = int(sorted(read_array(reference, "sizes"))[1])
        embeddings = seeded_embeddings(reference, size, width)
        inputs = [
            ("EMBEDDINGS", "FP32", [size, width], embeddings.tobytes()),
            ("COORDS", "INT64", [size, 2], read_array(reference, f"n{size}.coords").tobytes()),
        ]
        names = [output["name"] for output in config["output"] if output["name"] != "LAYERS"]
        answer = ask(url, max(deadline - time.monotonic(), 1), "slide_encoder", inputs, names)
        for name in names:
            true = read_array(reference, f"n{size}.slide_encoder.{name}")
            compare(reference, "slide_encoder", name, answer[name], true)


def ask_pipeline(
    url: str, timeout: float, tile: bytes, outputs: Iterable[str] = ("EMBEDDINGS",)
) -> dict[str, list[float]]:
    """What `slide_pipeline` answers for one tile in the grid's first cell."""
    inputs = [("TILES", "UINT8", TILE_SHAPE, tile), ("COORDS", "INT64", [1, 2], bytes(16))]
    # An ensemble whose EMBEDDINGS aren't asked for hands none to its second step (server#7482).
    return ask(url, timeout, "slide_pipeline", inputs, ["SLIDE", *outputs])


def ask(url: str, timeout: float, model: str, inputs: Inputs, outputs: list[str]) -> dict[str, list[float]]:
    """The outputs of one request; ValueError unless they are finite."""
    header = json.dumps(
        {
            "inputs": [
                {"name": n, "datatype": t, "shape": s, "parameters": {"binary_data_size": len(data)}}
                for n, t, s, data in inputs
            ],
            "outputs": [{"name": name} for name in outputs],
        }
    ).encode()
    length = {"Inference-Header-Content-Length": str(len(header))}
    body = header + b"".join(data for *_, data in inputs)
    answer = json.loads(call(f"{url}/v2/models/{model}/infer", timeout, body, length))
    found = {output["name"]: output["data"] for output in answer["outputs"]}
    for name in outputs:
        if not found.get(name) or not all(math.isfinite(value) for value in found[name]):
            raise ValueError(f"{model} answers with {name} that is missing or not finite")
    return found


def read_array(file: zipfile.ZipFile, name: str) -> array[float]:
    """The values of one array of an .npz archive, row by row."""
    raw = file.read(f"{name}.npy")
    start, size = (10, "<H") if raw[6] == 1 else (12, "<I")
    end = start + struct.unpack(size, raw[8:start])[0]
    return array(CODES[ast.literal_eval(raw[start:end].decode())["descr"]], raw[end:])


def seeded_embeddings(reference: zipfile.ZipFile, tiles: int, width: int) -> array[float]:
    """`gigapath_contract.reference.seeded_embeddings`; the sum of two floats rounds as there."""
    rows, columns = read_array(reference, "rows"), read_array(reference, "columns")
    slide = array("f")
    for i in range(tiles):
        row, column = i * width % len(rows), i * width % len(columns)
        pairs = zip(rows[row : row + width], columns[column : column + width], strict=True)
        slide.extend(a + b for a, b in pairs)
    return slide


def compare(
    reference: zipfile.ZipFile, model: str, name: str, found: Sequence[float], true: Sequence[float]
) -> None:
    """Raise ValueError unless the answer passes its model's gate."""
    (largest,), (smallest,), (relative,) = (
        read_array(reference, f"gate.{model}.{key}") for key in ("max_abs", "min_cosine", "max_relative")
    )
    difference = max(abs(a - b) for a, b in zip(found, true, strict=True))
    scale = max(map(abs, true))
    norms = math.sqrt(math.fsum(a * a for a in found) * math.fsum(b * b for b in true))
    dot = math.fsum(a * b for a, b in zip(found, true, strict=True))
    cosine = dot / norms if norms and len(found) > 1 else 1.0  # zeros, or one number, have no direction
    if difference > min(largest, relative * scale) or cosine < smallest:
        raise ValueError(
            f"{model} computes wrong numbers: {name} differs from the export's reference by {difference:.2g} "
            f"(cosine {cosine:.6f})"
        )


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


def check(mode: str, url: str, metrics_url: str, timeout: float, models: Path) -> None:
    """Raise OSError or ValueError, which say what is wrong, unless the server serves."""
    if mode == "live":
        call(f"{url}/v2/health/live", timeout)
        return
    if os.environ.get("GPU") == "required":
        check_gpu(url, timeout)
    before = counts(metrics_url, timeout)
    try:
        infer(url, timeout, models)
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
    repository = Path(os.environ.get("MODELS", "/models"))
    parser.add_argument("--models", type=Path, default=repository, help="(default: %(default)s)")
    arguments = parser.parse_args()
    if not 0 < arguments.timeout <= 3600:
        sys.exit(f"probe: --timeout is {arguments.timeout:g}: give up to 3600 seconds")
    try:
        check(arguments.mode, arguments.url, arguments.metrics_url, arguments.timeout, arguments.models)
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        sys.exit(f"probe: {error}")


if __name__ == "__main__":
    main()
