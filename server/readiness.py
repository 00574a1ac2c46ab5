"""Check that every model of a Triton answers a small, real request: READY alone is not enough."""

from __future__ import annotations

import numpy as np
import tritonclient.grpc as triton
from tritonclient.grpc import model_config_pb2
from tritonclient.utils import InferenceServerException, triton_to_np_dtype

from server.errors import ServerError

VARIABLE_DIM = 2


def check_models(
    client: triton.InferenceServerClient, timeout: float, headers: dict[str, str] | None = None
) -> list[str]:
    """Send one request to every model and return the models' names; `headers` open the list of models.

    A dimension that the configuration leaves open is `VARIABLE_DIM` long; numbers are 0, booleans are true.

    Raises:
        ServerError: an output is missing or not finite, or the request fails; the model is named.
    """
    index = client.get_model_repository_index(headers=headers, client_timeout=timeout)
    names = sorted(model.name for model in index.models)
    for name in names:
        try:
            config = client.get_model_config(name, client_timeout=timeout).config
            _check_model(client, config, timeout)
        except InferenceServerException as error:
            raise ServerError(f"model '{name}' is loaded but does not answer: {error.message()}") from error
    return names


def _check_model(
    client: triton.InferenceServerClient, config: model_config_pb2.ModelConfig, timeout: float
) -> None:
    inputs = []
    for spec in config.input:
        data_type = model_config_pb2.DataType.Name(spec.data_type).removeprefix("TYPE_")
        dtype = triton_to_np_dtype(data_type)
        shape = [1] * (config.max_batch_size > 0) + [dim if dim > 0 else VARIABLE_DIM for dim in spec.dims]
        tensor = triton.InferInput(spec.name, shape, data_type)
        tensor.set_data_from_numpy(np.full(shape, dtype is bool, dtype))
        inputs.append(tensor)
    result = client.infer(config.name, inputs, client_timeout=timeout)
    for spec in config.output:
        array = result.as_numpy(spec.name)
        if array is None or not np.isfinite(array).all():
            what = "is missing" if array is None else "has values that are not finite"
            raise ServerError(f"model '{config.name}' is loaded but its output {spec.name} {what}")
