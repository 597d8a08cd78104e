"""The names of the samplers, readable without loading a library; sampling.py has them, and each process names its own."""

SAMPLERS = ("ddim", "dpmsolver++", "euler")
