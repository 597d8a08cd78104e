"""The optimisation of particles: one update, the loop around it, and what keeps a run alive."""
