"""`dist-vsd requeue`: the last line of the Slurm scripts."""

from __future__ import annotations

from dist_vsd.commands.train_words import run_dir_of
from dist_vsd.sweep.requeue import requeue_if_progress

HELP = """usage: dist-vsd requeue EXIT_CODE [WORDS OF dist-vsd train ...]

The last line of a Slurm script: if the run stopped early with everything saved (75), put the job back into the queue; the
requeued job goes on from the checkpoint. A run that is done (0), failed (1), was refused (2), or made no progress in three
starts is not requeued. Ends with the exit code of the run.

EXIT_CODE is the launcher's; it counts where the run did not live to tell its own.
"""


def run(arguments: list[str]) -> int:
    """Run the command; see cli.main for the exit codes."""
    if not arguments or arguments[0] in ("-h", "--help"):
        print(HELP, end="")
        return 0
    if not arguments[0].isdigit() or int(arguments[0]) > 255:
        raise ValueError(f"requeue wants an exit code from 0 to 255 before the words of train, got {arguments[0][:40]!r}")
    return requeue_if_progress(run_dir_of(arguments[1:]), int(arguments[0]))
