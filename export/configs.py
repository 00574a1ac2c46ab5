"""Served configs: a model's committed `config.pbtxt`, narrowed to one export."""

from __future__ import annotations

from pathlib import Path

from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2

from export.errors import ExportError
from gigapath_contract.schema import Contract


def read_config(path: Path) -> model_config_pb2.ModelConfig:
    """Parse a `config.pbtxt`.

    Raises:
        ExportError: the file is missing or is no model configuration.
    """
    config = model_config_pb2.ModelConfig()
    try:
        text_format.Parse(path.read_text(), config)
    except FileNotFoundError:
        raise ExportError(
            f"{path} is missing: a repository starts from the committed configs of model_repository/"
        ) from None
    except text_format.ParseError as error:
        raise ExportError(f"{path} is not a Triton model configuration: {error}") from None
    return config


def served_config(template: model_config_pb2.ModelConfig, contract: Contract) -> str:
    """`template` with exact dims and batches, one version alone, the contract, no LOGITS without a head.

    `tile_encoder` gets the further outputs that the contract names, the ensemble TILE_LOGITS alone: a request
    to it may not leave out what its first step hands on.
    """
    config = model_config_pb2.ModelConfig()
    config.CopyFrom(template)
    embed = contract.slide_encoder.embed_dim
    exact = {
        "EMBEDDINGS": [contract.tile_encoder.embed_dim],
        "LAYERS": [contract.slide_encoder.depth + 1, 2, embed],
        "SLIDE": [embed],
    }
    if contract.head is None:
        _drop_logits(config)
    else:
        exact["LOGITS"] = [len(contract.head.classes)]
    for name, dims in contract.tile_outputs.items():
        if config.name == "tile_encoder" and name != "EMBEDDINGS":
            config.output.add(name=name, data_type=model_config_pb2.TYPE_FP32, dims=dims)
        elif name == "TILE_LOGITS" and config.ensemble_scheduling.step:
            config.output.add(name=name, data_type=model_config_pb2.TYPE_FP32, dims=[-1, *dims])
            config.ensemble_scheduling.step[0].output_map[name] = name
    for tensor in (*config.input, *config.output):
        if tensor.name in exact:
            tensor.dims[-len(exact[tensor.name]) :] = exact[tensor.name]
    if config.max_batch_size:
        config.max_batch_size = contract.tile.max_batch
        config.dynamic_batching.preferred_batch_size[:] = [contract.tile.max_batch]
    config.version_policy.Clear()
    config.version_policy.specific.versions.append(contract.version)
    config.parameters["contract"].string_value = contract.to_json()
    return str(text_format.MessageToString(config))


def engine_config(served: model_config_pb2.ModelConfig, profiles: int) -> str:
    """A served config turned to `model.plan`, with as many optimisation profiles to choose from."""
    config = model_config_pb2.ModelConfig()
    config.CopyFrom(served)
    config.backend = "tensorrt"
    config.default_model_filename = "model.plan"
    config.ClearField("optimization")  # options of ONNX Runtime; an engine has its own built in
    del config.instance_group[:]
    group = config.instance_group.add(count=1, kind=model_config_pb2.ModelInstanceGroup.KIND_GPU)
    group.profile.extend(str(index) for index in range(profiles))
    return str(text_format.MessageToString(config))


def _drop_logits(config: model_config_pb2.ModelConfig) -> None:
    for index in reversed(range(len(config.output))):
        if config.output[index].name == "LOGITS":
            del config.output[index]
    for step in config.ensemble_scheduling.step:
        step.output_map.pop("LOGITS", None)
