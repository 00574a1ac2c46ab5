"""Triton over gRPC: connection, contract, parity."""
