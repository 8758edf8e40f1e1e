"""Models of `transformers`: loading them and taking them apart. Knows nothing about KV caches."""
