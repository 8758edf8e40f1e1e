"""Models of `transformers`: loading them, making them up, and taking them apart. Knows nothing about KV caches."""
