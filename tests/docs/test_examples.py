"""The code of docs/examples, run as it stands against a real server."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from client.triton.connection import Connection
from client.triton.contract import read_contract
from client.triton.endpoint import Endpoint

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES, MODELS = ROOT / "docs" / "examples", ROOT / "model_repository"


def python_of(page: str) -> str:
    """The Python on a page of docs/examples, whose blocks follow one another."""
    text = (EXAMPLES / page).read_text()
    return "\n".join(re.findall(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL))


def test_the_page_lists_the_inputs_and_outputs_of_every_model() -> None:
    page = (EXAMPLES / "minimal_client.md").read_text()
    for config in MODELS.glob("*/config.pbtxt"):
        inputs, outputs = re.findall(r"^(?:in|out)put \[(.*?)\]\n", config.read_text() + "\n", re.M | re.S)
        cells = re.search(rf"^\| `{config.parent.name}` \|(.*?)\|(.*?)\|", page, re.MULTILINE)
        assert cells, config.parent.name
        for written, configured in zip(cells.groups(), (inputs, outputs), strict=True):
            assert re.findall(r"`(\w+)`", written) == re.findall(r'name: "(\w+)"', configured)


def test_a_client_of_tritonclient_alone_gets_what_the_two_encoders_return(
    triton_url: str, real_slide: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code = python_of("minimal_client.md")
    assert code.count("127.0.0.1:8001") == 1
    names: dict[str, Any] = {}
    monkeypatch.chdir(real_slide.parent)
    exec(code.replace("127.0.0.1:8001", triton_url), names)

    with Connection(Endpoint(triton_url)) as connection:
        contract = read_contract(connection)
        inputs = {"TILES": names["tiles"]}
        embeddings = connection.infer("tile_encoder", inputs, ["EMBEDDINGS"])["EMBEDDINGS"]
        inputs = {"EMBEDDINGS": embeddings, "COORDS": np.array(names["corners"], np.int64)}
        logits = connection.infer("slide_encoder", inputs, ["LOGITS"])["LOGITS"]
        inputs["KEEP"] = np.arange(64)[None] != 5
        without = connection.infer("slide_occlusion", inputs, ["LOGITS"])["LOGITS"]
    assert len(embeddings) == 64
    np.testing.assert_allclose(names["embeddings"], embeddings, atol=1e-5)
    np.testing.assert_allclose(names["features"], embeddings, atol=1e-5)
    np.testing.assert_allclose(names["logits"], logits, atol=1e-5)
    np.testing.assert_allclose(names["score"], logits, atol=1e-5)
    np.testing.assert_allclose(names["without"][5], without[0], atol=1e-5)
    assert contract.head is not None
    printed = capsys.readouterr().out
    assert all(repr(name) in printed for name in contract.head.classes)
    assert (contract.tile.size_px, contract.tile.crop_px) == (256, 224)
