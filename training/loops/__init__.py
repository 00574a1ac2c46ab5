"""Training loops: optimiser, metrics, epochs."""
