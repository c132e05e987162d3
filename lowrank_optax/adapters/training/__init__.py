"""Training of adapters: freezing, ranks by layer, learning rates and phases."""
