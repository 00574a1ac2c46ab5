"""From slides to embeddings, scores and occlusion attributions over gRPC; never imports torch."""
