"""theta and g(theta, c): the 3D (and 2D) representations that are optimised."""
