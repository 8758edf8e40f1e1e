"""The vocabulary of KV-cache offloading: specs, schedule, profiles, traces. Knows nothing of torch or SimPy."""
