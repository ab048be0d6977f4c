"""Checkpoints: those of runs (`store`), and files of weights in every format (`weights`)."""
