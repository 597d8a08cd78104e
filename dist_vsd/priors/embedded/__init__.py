"""The prior that ships with the package: its world, its recipe and, in weights/, the networks."""
