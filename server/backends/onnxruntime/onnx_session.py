"""Open the ONNX Runtime session that a Triton model configuration describes.

The parameters are those of NVIDIA's C++ backend (`intra_op_thread_count`, `inter_op_thread_count`,
`execution_mode`, `enable_mem_arena`, `enable_mem_pattern`, `memory.enable_memory_arena_shrinkage`,
`optimization.graph.level`); any `session.*` parameter and all parameters of the accelerator `cuda` are passed
to ONNX Runtime unchanged.
"""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import onnxruntime as ort

GRAPH_LEVELS = {
    -1: ort.GraphOptimizationLevel.ORT_ENABLE_BASIC,
    0: ort.GraphOptimizationLevel.ORT_ENABLE_ALL,
    1: ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED,
    2: ort.GraphOptimizationLevel.ORT_DISABLE_ALL,
}
DATA_TYPES = {
    "TYPE_BOOL": "tensor(bool)",
    "TYPE_UINT8": "tensor(uint8)",
    "TYPE_INT32": "tensor(int32)",
    "TYPE_INT64": "tensor(int64)",
    "TYPE_FP16": "tensor(float16)",
    "TYPE_FP32": "tensor(float)",
    "TYPE_FP64": "tensor(double)",
}
CUDA = "CUDAExecutionProvider"
CUDA_LIBRARY = Path(ort.__file__).parent / "capi" / "libonnxruntime_providers_cuda.so"
SHRINK = "memory.enable_memory_arena_shrinkage"
Config = dict[str, Any]
"""A Triton model configuration as JSON, as the server hands it to a backend."""


def open_session(path: Path, config: Config, device: int | None = None) -> ort.InferenceSession:
    """Load the graph at `path`, on the CUDA device that Triton gave the model, or on the CPU without one.

    Raises RuntimeError where there is a device and ONNX Runtime cannot use it (by itself it would say so in
    the log and continue on the CPU), ValueError where the configuration doesn't fit the graph, and ONNX
    Runtime's own errors.
    """
    providers: list[Any] = ["CPUExecutionProvider"]
    if device is not None and CUDA in ort.get_available_providers():
        ort.preload_dlls()  # CUDA and cuDNN may be Python packages, outside the loader's path
        providers.insert(0, (CUDA, cuda_options(config, device)))
    session = ort.InferenceSession(path, session_options(config), providers=providers)
    if device is not None and CUDA not in session.get_providers():
        raise RuntimeError(
            f"Triton sees GPU {device} and ONNX Runtime cannot use it: {why_no_cuda()}; to serve on the CPU, "
            "start the server with CUDA_VISIBLE_DEVICES set to nothing"
        )
    check_tensors(config, session)
    return session


def why_no_cuda(library: Path = CUDA_LIBRARY) -> str:
    """What ONNX Runtime's CUDA provider lacks: the package, or a library that its own `library` links to."""
    if not library.exists():
        return "this onnxruntime is for the CPU alone, uninstall it and install onnxruntime-gpu"
    try:
        ctypes.CDLL(str(library))
    except OSError as error:
        return " ".join(str(error).split())
    return "the log has ONNX Runtime's reason"


def describe(session: ort.InferenceSession) -> str:
    """ONNX Runtime's version, and the session's providers with the options that decide its numbers."""
    options = session.get_provider_options().get(CUDA, {})
    device = f" (device {options['device_id']}, use_tf32 {options['use_tf32']})" if options else ""
    providers = ", ".join(name + device * (name == CUDA) for name in session.get_providers())
    return f"ONNX Runtime {ort.__version__} on {providers}"


def cuda_options(config: Config, device: int) -> dict[str, str]:
    """Options of the CUDA provider: those of the accelerator `cuda` in `config`; TF32 is off unless named."""
    accelerators = config.get("optimization", {}).get("execution_accelerators", {})
    options = {"use_tf32": "0"}
    for accelerator in accelerators.get("gpu_execution_accelerator", []):
        if accelerator["name"] == "cuda":
            options |= accelerator.get("parameters", {})
    return {**options, "device_id": str(device)}


def session_options(config: Config) -> ort.SessionOptions:
    """Threads, memory and graph optimisation as `config` sets them; ONNX Runtime's defaults otherwise."""
    values = _parameters(config)
    options = ort.SessionOptions()
    level = int(config.get("optimization", {}).get("graph", {}).get("level", 0))
    options.graph_optimization_level = GRAPH_LEVELS[level]
    options.intra_op_num_threads = int(values.get("intra_op_thread_count", 0))
    options.inter_op_num_threads = int(values.get("inter_op_thread_count", 0))
    if values.get("execution_mode", "0") == "1":
        options.execution_mode = ort.ExecutionMode.ORT_PARALLEL
    options.enable_cpu_mem_arena = values.get("enable_mem_arena", "1") == "1"
    options.enable_mem_pattern = values.get("enable_mem_pattern", "1") == "1"
    for key, value in values.items():
        if key.startswith("session."):
            options.add_session_config_entry(key, value)
    return options


def run_options(config: Config) -> ort.RunOptions:
    """Options of every run: which arenas release their memory afterwards."""
    options = ort.RunOptions()
    values = _parameters(config)
    if SHRINK in values:
        options.add_run_config_entry(SHRINK, values[SHRINK])
    return options


def check_tensors(config: Config, session: ort.InferenceSession) -> None:
    """Raise ValueError unless `config` fits the graph by the rules of NVIDIA's C++ backend.

    In particular a dimension that the graph fixes has to be the same number in the configuration, not -1:
    what loads here loads there.
    """
    batch = [-1] if config.get("max_batch_size", 0) > 0 else []
    if len(config["input"]) != len(session.get_inputs()):
        raise ValueError(f"the graph has inputs {[node.name for node in session.get_inputs()]}")
    for specs, nodes in (
        (config["input"], session.get_inputs()),
        (config["output"], session.get_outputs()),
    ):
        graph = {node.name: node for node in nodes}
        for spec in specs:
            if spec["name"] not in graph:
                raise ValueError(f"the graph has no {spec['name']}, only {', '.join(graph)}")
            node = graph[spec["name"]]
            shape = [dim if isinstance(dim, int) else -1 for dim in node.shape]
            dims = batch + [int(dim) for dim in spec["dims"]]
            fits = len(shape) == len(dims) and all(a in (-1, b) for a, b in zip(shape, dims, strict=True))
            if not fits or shape[: len(batch)] != batch or DATA_TYPES.get(spec["data_type"]) != node.type:
                raise ValueError(
                    f"{node.name} is {node.type} {shape} in the graph"
                    f" but {spec['data_type']} {dims} in the configuration"
                )


def _parameters(config: Config) -> dict[str, str]:
    return {key: value["string_value"] for key, value in config.get("parameters", {}).items()}
