import os

os.environ.setdefault("WANDB_MODE", "disabled")  # each run's recording costs seconds; tests/test_wandb.py turns it on
