"""How good the particles are: recognition by CLIP, and the overlap of their shapes with known scenes."""
