"""Sampling: prefill, the jitted decode loop, and the transforms of logits."""
