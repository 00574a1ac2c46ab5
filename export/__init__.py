"""From PyTorch to ONNX and TensorRT, with a parity contract, into model_repository/."""
