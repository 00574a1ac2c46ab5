"""The demo export in a real Triton: exact against bare sessions, and the limits of the ensemble."""

from __future__ import annotations

import json
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tritonclient.grpc as triton
from tritonclient.utils import InferenceServerException

from server.backends.onnxruntime.onnx_session import open_session
from server.local import RunningServer
from tests.support.served import suspended, wait_for_queue, wait_until

Arrays = dict[str, np.ndarray]
Infer = Callable[..., Arrays]
InferLater = Callable[..., Future[Arrays]]
Json = dict[str, Any]
MODELS = ("tile_encoder", "slide_encoder", "slide_occlusion", "slide_pipeline")


def tiles(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, 224, 224, 3), np.uint8)


def coords(count: int) -> np.ndarray:
    """Distinct places of a 40-column grid, row-major."""
    return np.array([(256 * (i % 40), 256 * (i // 40)) for i in range(count)], np.int64)


def slide(count: int, embed_dim: int) -> Arrays:
    values = np.random.default_rng(count).normal(size=(count, embed_dim))
    return {"EMBEDDINGS": values.astype(np.float32), "COORDS": coords(count)}


@pytest.fixture(scope="module")
def configs(triton_url: str) -> dict[str, Json]:
    """Every model's configuration as the server reports it."""
    with triton.InferenceServerClient(triton_url) as client:
        return {name: client.get_model_config(name, as_json=True)["config"] for name in MODELS}


@pytest.fixture(scope="module")
def contract(configs: dict[str, Json]) -> Json:
    return dict(json.loads(configs["tile_encoder"]["parameters"]["contract"]["string_value"]))


@pytest.fixture(scope="module")
def bare(demo_repository: Path, configs: dict[str, Json]) -> Callable[..., Arrays]:
    """`bare(model, **inputs)`: a separate session with the served session options, without Triton."""
    sessions = {}

    def run(model: str, **inputs: np.ndarray) -> Arrays:
        if model not in sessions:
            (version,) = configs[model]["version_policy"]["specific"]["versions"]
            sessions[model] = open_session(demo_repository / model / version / "model.onnx", configs[model])
        names = [output["name"] for output in configs[model]["output"]]
        return dict(zip(names, sessions[model].run(names, inputs), strict=True))

    return run


def assert_same(served: Arrays, expected: Arrays) -> None:
    """The same names, shapes, types and values: difference 0.0."""
    assert served.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_array_equal(served[name], value, err_msg=name, strict=True)


@pytest.mark.parametrize("count", [1, 7, 64])
def test_tile_embeddings_equal_the_bare_session(
    triton_url: str, infer: Infer, bare: Infer, count: int
) -> None:
    assert_same(
        infer(triton_url, "tile_encoder", TILES=tiles(count)), bare("tile_encoder", TILES=tiles(count))
    )


@pytest.mark.parametrize("count", [1, 7, 64, 500])
def test_slide_outputs_equal_the_bare_session(
    triton_url: str, infer: Infer, bare: Infer, contract: Json, count: int
) -> None:
    inputs = slide(count, contract["tile_encoder"]["embed_dim"])
    assert_same(infer(triton_url, "slide_encoder", **inputs), bare("slide_encoder", **inputs))


@pytest.mark.parametrize(("count", "masks"), [(1, 1), (64, 5)])
def test_occlusion_outputs_equal_the_bare_session(
    triton_url: str, infer: Infer, bare: Infer, contract: Json, count: int, masks: int
) -> None:
    inputs = slide(count, contract["tile_encoder"]["embed_dim"])
    keep = np.random.default_rng(masks).random((masks, count)) > 0.3
    assert_same(
        infer(triton_url, "slide_occlusion", **inputs, KEEP=keep),
        bare("slide_occlusion", **inputs, KEEP=keep),
    )


@pytest.mark.parametrize("count", [1, 7, 64])
def test_the_ensemble_equals_its_two_models(triton_url: str, infer: Infer, bare: Infer, count: int) -> None:
    embeddings = bare("tile_encoder", TILES=tiles(count))
    expected = bare("slide_encoder", **embeddings, COORDS=coords(count))
    served = infer(triton_url, "slide_pipeline", TILES=tiles(count), COORDS=coords(count))
    assert_same(served, {**embeddings, **expected})


def test_the_ensemble_refuses_65_tiles_in_tritons_words(triton_url: str, infer: Infer) -> None:
    with pytest.raises(
        InferenceServerException, match="batch-size must be <= 64 for 'tile_encoder'"
    ) as error:
        infer(triton_url, "slide_pipeline", TILES=tiles(65), COORDS=coords(65))
    assert error.value.status() == "StatusCode.INVALID_ARGUMENT"


def test_requests_that_wait_are_merged_into_one_exact_batch(
    triton_server: RunningServer, infer_later: InferLater, bare: Infer
) -> None:
    """Two requests of 4 tiles queue up behind two of 64, one that runs and one that is to run next."""
    batches = [tiles(4, seed=1), tiles(4, seed=2)]
    merged = bare("tile_encoder", TILES=np.concatenate(batches))["EMBEDDINGS"]
    with triton.InferenceServerClient(triton_server.url) as client:

        def counts() -> np.ndarray:
            (stats,) = client.get_inference_statistics("tile_encoder").model_stats
            return np.array([stats.inference_count, stats.execution_count])

        with suspended(triton_server.pid, "tile_encoder"):
            for _ in range(2):
                infer_later(client, "tile_encoder", TILES=tiles(64))
            wait_for_queue(triton_server, "tile_encoder", 1)
            before = counts()  # with all earlier requests: Triton counts them before it runs the next one
            answers = [infer_later(client, "tile_encoder", TILES=batch) for batch in batches]
            wait_for_queue(triton_server, "tile_encoder", 3)
        served = [answer.result(60)["EMBEDDINGS"] for answer in answers]
        wait_until(lambda: (counts() - before).tolist() == [64 + 64 + 4 + 4, 3])
    np.testing.assert_array_equal(np.concatenate(served), merged, strict=True)


def test_no_model_has_a_queue_policy(configs: dict[str, Json]) -> None:
    """Under one, Triton 2.51 leaves an instance idle for up to 500 ms while a request waits."""
    for name, config in configs.items():
        batching = config.get("dynamic_batching", {})
        assert not batching.get("default_queue_policy"), name
        assert not batching.get("priority_levels"), name


def test_every_model_carries_the_same_contract(configs: dict[str, Json]) -> None:
    contracts = {config["parameters"]["contract"]["string_value"] for config in configs.values()}
    (text,) = contracts
    contract = json.loads(text)
    assert contract["schema"] == 1
    assert contract["preset"] == "demo"
    assert contract["tile"]["max_batch"] == configs["tile_encoder"]["max_batch_size"] == 64


def test_a_position_outside_the_grid_is_an_error(triton_url: str, infer: Infer, contract: Json) -> None:
    inputs = slide(3, contract["tile_encoder"]["embed_dim"])
    inputs["COORDS"][1, 0] = 256 * contract["limits"]["grid"]
    with pytest.raises(InferenceServerException, match="out of data bounds") as error:
        infer(triton_url, "slide_encoder", **inputs)
    assert error.value.status() == "StatusCode.INVALID_ARGUMENT"
