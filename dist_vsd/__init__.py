"""dist_vsd: text to 3D by variational score distillation, for many particles on many ranks."""

__version__ = "0.9.0"
