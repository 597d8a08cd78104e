"""Particles as files for others: turntables, point clouds and meshes."""
