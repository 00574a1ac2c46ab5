"""From slides to embeddings, scores and occlusion attributions over gRPC; never imports torch."""

__version__ = "0.1.0"
