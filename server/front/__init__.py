"""A gRPC proxy before a Triton that looks at every request's shapes before Triton's C++ does."""
