"""eps_phi: the score of the particles' renders, learned as LoRA layers on the frozen prior's network."""
