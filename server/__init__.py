"""A local Triton: the real tritonserver, no docker, no GPU."""
