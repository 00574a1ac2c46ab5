"""The two encoders, their weights and presets."""
