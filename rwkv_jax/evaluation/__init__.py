"""Measuring a model: bits per byte of any text, LAMBADA, multiple choice, and lm-eval."""
