"""Frozen models of images: what score distillation follows."""
