"""One slide, from its file to embeddings and scores."""
