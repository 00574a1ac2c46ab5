"""Requests that contradict themselves or the contract are refused by the server, at once and in one line."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import tritonclient.grpc as triton
from tritonclient.utils import InferenceServerException

from server.backends.onnxruntime.request_limits import Limits, check_limits, read_limits

Arrays = dict[str, np.ndarray]
Infer = Callable[..., Arrays]


@pytest.fixture(scope="module")
def contract(triton_url: str) -> dict[str, Any]:
    with triton.InferenceServerClient(triton_url) as client:
        config = client.get_model_config("slide_encoder").config
    return dict(json.loads(config.parameters["contract"].string_value))


@pytest.fixture(scope="module")
def width(contract: dict[str, Any]) -> int:
    return int(contract["tile_encoder"]["embed_dim"])


def slide(tiles: int, width: int, *, coords: int | None = None, masks: int = 0, kept: int = 0) -> Arrays:
    inputs: Arrays = {
        "EMBEDDINGS": np.zeros((tiles, width), np.float32),
        "COORDS": np.zeros((tiles if coords is None else coords, 2), np.int64),
    }
    if masks:
        inputs["KEEP"] = np.ones((masks, kept or tiles), np.bool_)
    return inputs


def refusal(infer: Infer, url: str, inputs: Arrays) -> str:
    """Why the server refuses the request: one line, at once, as the client's fault."""
    model = "slide_occlusion" if "KEEP" in inputs else "slide_encoder"
    began = time.monotonic()  # to compute what is refused here takes minutes, or more memory than there is
    with pytest.raises(InferenceServerException) as error:
        infer(url, model, **inputs)
    assert time.monotonic() - began < 60
    assert error.value.status() == "StatusCode.INVALID_ARGUMENT"
    message = str(error.value.message())
    assert "\n" not in message
    return message


@pytest.mark.parametrize(
    ("tiles", "coords", "kept", "message"),
    [
        (1, 5, 0, "N is 1 in EMBEDDINGS, 5 in COORDS"),
        (5, 1, 0, "N is 5 in EMBEDDINGS, 1 in COORDS"),
        (1, 0, 0, "N is 1 in EMBEDDINGS, 0 in COORDS"),
        (1, 5, 5, "N is 1 in EMBEDDINGS, 5 in COORDS"),
        (5, 5, 1, "N is 5 in EMBEDDINGS, 1 in KEEP"),
        (0, 0, 0, "a slide of 0 tiles: this export takes 1 to 200000"),
    ],
)
def test_a_slide_of_unequal_or_no_length_is_refused(
    triton_url: str, infer: Infer, width: int, tiles: int, coords: int, kept: int, message: str
) -> None:
    inputs = slide(tiles, width, coords=coords, masks=2 * (kept > 0), kept=kept)
    assert message in refusal(infer, triton_url, inputs)


def test_a_slide_of_too_many_tiles_is_refused_at_once(triton_url: str, infer: Infer, width: int) -> None:
    assert "a slide of 200001 tiles" in refusal(infer, triton_url, slide(200_001, width))


def test_too_many_masks_are_refused_at_once(
    triton_url: str, infer: Infer, width: int, contract: dict[str, Any]
) -> None:
    """100,000 masks of 50 tiles are a request of 5 MB that would take 140 GB."""
    limit = contract["occlusion"]["max_mask_tokens"]
    message = refusal(infer, triton_url, slide(50, width, masks=100_000))
    assert f"are 5100000 tokens, this export takes {limit} per request" in message


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_numbers_that_are_not_finite_are_refused_by_tile(
    triton_url: str, infer: Infer, width: int, value: float
) -> None:
    inputs = slide(5, width)
    inputs["EMBEDDINGS"][3, 7] = value
    assert "EMBEDDINGS of tile 3 are not finite" in refusal(infer, triton_url, inputs)


def test_a_tile_that_no_mask_keeps_can_be_anything(triton_url: str, infer: Infer, width: int) -> None:
    inputs = slide(5, width, masks=2)
    inputs["EMBEDDINGS"][:] = np.random.default_rng(0).normal(size=(5, width))
    inputs["KEEP"][:, 3] = False
    want = infer(triton_url, "slide_occlusion", **inputs)
    inputs["EMBEDDINGS"][3] = np.nan
    for name, values in infer(triton_url, "slide_occlusion", **inputs).items():
        np.testing.assert_array_equal(values, want[name])
    inputs["KEEP"][1, 3] = True
    assert "EMBEDDINGS of tile 3 are not finite" in refusal(infer, triton_url, inputs)


@pytest.mark.parametrize("place", [(-1, 0), (0, 256_000), (1 << 62, 0), (-(1 << 63), 0)])
def test_a_place_outside_the_grid_is_refused_by_tile(
    triton_url: str, infer: Infer, width: int, place: tuple[int, int]
) -> None:
    inputs = slide(5, width)
    inputs["COORDS"][2] = place
    message = refusal(infer, triton_url, inputs)
    assert f"COORDS of tile 2 are {place}, out of data bounds" in message


def test_what_keeps_to_the_limits_passes() -> None:
    """The largest slide, the last cell, the largest float32 numbers."""
    inputs = slide(100, 8, masks=10)
    inputs["COORDS"][:] = 999 * 256 + 255
    inputs["EMBEDDINGS"][:] = np.finfo(np.float32).max
    check_limits(inputs, Limits(tiles=100, mask_tokens=10 * 101, grid=1000))
    for tighter, what in ((Limits(99, 1010, 1000), "tiles"), (Limits(100, 1009, 1000), "masks")):
        with pytest.raises(ValueError, match=what):
            check_limits(inputs, tighter)
    with pytest.raises(ValueError, match="grid"):
        check_limits(inputs, Limits(100, 1010, 999))


def test_a_request_without_masks_is_refused_by_name(triton_url: str, infer: Infer, width: int) -> None:
    inputs = slide(5, width, masks=2)
    inputs["KEEP"] = inputs["KEEP"][:0]
    assert "KEEP has no mask" in refusal(infer, triton_url, inputs)


def test_a_contract_without_limits_does_not_load() -> None:
    assert read_limits({}) is None
    with pytest.raises(KeyError):
        read_limits({"parameters": {"contract": {"string_value": "{}"}}})
