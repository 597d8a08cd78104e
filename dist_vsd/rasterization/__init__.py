"""Pictures of triangle meshes, differentiable: the face that a pixel sees, where on it, how far away; silhouettes pull at vertices."""
