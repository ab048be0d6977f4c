"""Training: the objective, the optimizer, the jitted step and the loop around it."""
