"""The names of the samplers, readable without loading a library; sampling.py has them."""

SAMPLERS = ("ddim", "dpmsolver++")
