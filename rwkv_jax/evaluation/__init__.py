"""What a model is worth: bits per byte of any text, LAMBADA, multiple choice, and lm-eval."""
