"""Checkpoints: our own runs (orbax) and the key map to the official names."""
