"""The names of the samplers, readable without loading a library; sampling.py has them, and each process names its own."""

DISCRETE_SAMPLERS, FLOW_SAMPLER = ("ddim", "dpmsolver++"), "euler"
SAMPLERS = (*DISCRETE_SAMPLERS, FLOW_SAMPLER)
