"""The mathematics of the diffused distributions p_t: processes, conversions between predictions, draws of t."""
