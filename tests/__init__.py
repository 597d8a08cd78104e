import os

os.environ.setdefault("WANDB_MODE", "disabled")  # each run's recording costs seconds; tests/test_wandb.py turns it on
os.environ["OMP_NUM_THREADS"] = "1"  # read when torch is imported; threads that share cores wait for each other
