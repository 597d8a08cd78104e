"""`python -m dist_vsd`, which is what `accelerate launch -m dist_vsd` starts on every rank."""

import sys

from dist_vsd.cli import main

if __name__ == "__main__":
    sys.exit(main())
