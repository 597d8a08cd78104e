"""The mathematics of the diffused distributions p_t: schedules, conversions between predictions, draws of t."""
