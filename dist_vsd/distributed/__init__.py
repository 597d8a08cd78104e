"""Ranks: which of them owns which particle, random numbers that do not depend on it, and every collective."""
