"""PyTorch: the two encoders, their weights, fine-tuning."""
