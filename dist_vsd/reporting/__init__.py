"""What a run tells while it goes: figures, progress on the terminal, wandb."""
