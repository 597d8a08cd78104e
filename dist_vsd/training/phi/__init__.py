"""How eps_phi learns: its trainers by launch, the step of an update, and the scale of its loss."""
