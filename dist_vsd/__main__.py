"""`python -m dist_vsd`, which is what `accelerate launch -m dist_vsd` starts on every rank."""

from dist_vsd.cli import run_process

if __name__ == "__main__":
    run_process()
