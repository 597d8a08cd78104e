"""What the fork server of tests/ranks.py imports before it forks: modules only, no threads, no process group."""

# ruff: noqa: E402, I001
import contextlib
import io
import os

from dist_vsd.cli import _quiet_libraries

_quiet_libraries()  # read when the libraries are imported
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
with contextlib.suppress(ImportError), contextlib.redirect_stdout(io.StringIO()):
    import deepspeed  # noqa: F401
    import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401  (imports torch's compiler, at every start of ZeRO)

import PIL.Image
import dist_vsd.commands.estimate  # noqa: F401
import dist_vsd.distributed.process  # noqa: F401
import dist_vsd.commands.train  # noqa: F401
import dist_vsd.evaluation.preview  # noqa: F401
import dist_vsd.objectives.sds  # noqa: F401
import dist_vsd.objectives.vsd  # noqa: F401
import dist_vsd.priors.stable_diffusion  # noqa: F401
import dist_vsd.particles.radiance_field  # noqa: F401
import dist_vsd.training.loop  # noqa: F401
import dist_vsd.training.state  # noqa: F401

PIL.Image.init()  # imports a module for each format


def warm_up():
    """Do once what libraries do at their first use and keep: compile patterns, read sources for the help, map weights' names.

    No gradients and no tokens: the threads of autograd and of tokenizers do not survive a fork.
    """
    from dist_vsd.commands.train_words import parse_words
    from dist_vsd.priors.clip import ClipScorer
    from dist_vsd.priors.table import load_prior
    from dist_vsd.score.lora_score import LoraScore
    from dist_vsd.score.score_config import ScoreConfig

    state = torch.random.get_rng_state()
    parse_words(["a green duck"])
    ClipScorer.load()
    LoraScore(load_prior("embedded").network, ScoreConfig(), torch.Generator())
    torch.random.set_rng_state(state)
