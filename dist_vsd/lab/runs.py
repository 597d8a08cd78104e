"""Runs of the laboratory on disk: a folder a run, begun again if it was not finished.

In <out>/runs/<mixture>-<variant>-seed<s>/ there are metrics.jsonl, a line each time that particles were measured; trajectory.safetensors,
where they were then: theta (S, n, D) and update (S,); and result.json, written last: what was asked, and the figures at the end.
"""

from __future__ import annotations

import dataclasses
import json
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dist_vsd.lab.flow import flow
from dist_vsd.lab.measures import Target
from dist_vsd.lab.settings import Settings, Variant
from dist_vsd.priors.gaussian_mixture import GaussianMixturePrior
from dist_vsd.serialization import read_tensors, write_tensors

METRICS, TRAJECTORY, RESULT = "metrics.jsonl", "trajectory.safetensors", "result.json"
PROCESS_OF_OLD_RESULTS = {"process": "variance_preserving"}  # they don't name it
NUM_LOOKS = 30  # how often particles are measured in a run, after the start


@dataclasses.dataclass(frozen=True)
class Run:
    """One run of a comparison.

    Attributes:
        mixture: its name, or the path of its file.
        variant: what is compared.
        seed: of all draws.
        settings: what all runs share.
        measures: some of settings.MEASURES.
    """

    mixture: str
    variant: Variant
    seed: int
    settings: Settings
    measures: tuple[str, ...]

    @property
    def name(self) -> str:
        """The run's folder."""
        return f"{mixture_name(self.mixture)}-{self.variant.name}-seed{self.seed}"

    def asked(self, prior: GaussianMixturePrior) -> dict[str, Any]:
        """Return all that decides the run's figures, as plain values."""
        settings = dataclasses.asdict(self.settings)
        if self.settings.process != "rectified_flow":
            del settings["shift"]
        return {
            "mixture": describe(prior),
            **dataclasses.asdict(self.variant),
            "seed": self.seed,
            **settings,
            "measures": list(self.measures),
        }


def mixture_name(mixture: str) -> str:
    """Return a mixture's name in files: that of its own file, without folder and ending, in safe letters."""
    return re.sub(r"[^\w-]+", "_", Path(mixture).stem)[:60]


def describe(prior: GaussianMixturePrior) -> dict[str, Any]:
    """Return a mixture as plain values."""
    return {name: getattr(prior, name).tolist() for name in ("means", "covariances", "weights")}


def read_result(folder: Path, asked: dict[str, Any]) -> dict[str, Any] | None:
    """Return a finished run's result; None if it is not finished, or its result is damaged.

    Args:
        folder: of the run.
        asked: what the run shall be.

    Raises:
        ValueError: the folder holds the result of something else.
    """
    try:
        result = json.loads((folder / RESULT).read_text())
        kept, _ = PROCESS_OF_OLD_RESULTS | result["asked"], result["figures"]
        read_tensors(folder / TRAJECTORY)
    except (OSError, ValueError, TypeError, KeyError):
        return None
    for name, value in json.loads(json.dumps(asked)).items():
        if kept.get(name) != value:
            was, now = (str(other)[:60] for other in (kept.get(name), value))
            raise ValueError(f"{folder} was run with {name} {was}, not {now}: choose another --out, or ask for the same")
    return result


def execute(
    run: Run, target: Target, folder: Path, should_stop: Callable[[], bool], advance: Callable[[], None]
) -> dict[str, Any] | None:
    """Run particles and write what they did.

    Args:
        run: what to run.
        target: its mixture.
        folder: of the run; made if missing.
        should_stop: asked before every update.
        advance: called after every update.

    Returns:
        The result; None if it was stopped, which leaves nothing that counts as finished.

    Raises:
        RunFailed: a particle is no longer finite.
    """
    begin, num_updates = time.monotonic(), run.settings.num_updates
    looks = sorted({round(i * num_updates / NUM_LOOKS) for i in range(NUM_LOOKS + 1)})
    folder.mkdir(parents=True, exist_ok=True)
    (folder / RESULT).unlink(missing_ok=True)
    seen: list[Tensor] = []
    lines: list[dict[str, Any]] = []
    with open(folder / METRICS, "w") as file:
        for update, theta, phi in flow(target.prior, run.variant, run.settings, run.seed):
            if should_stop():
                return None
            if update in looks:
                seen.append(theta.clone())
                lines.append({"update": update, **target.measure(theta, run.measures, phi)})
                file.write(json.dumps(lines[-1]) + "\n")
                file.flush()
            if update:
                advance()
    write_tensors({"theta": torch.stack(seen), "update": torch.tensor(looks)}, folder / TRAJECTORY)
    result = {"asked": run.asked(target.prior), "figures": final_figures(lines), "seconds": round(time.monotonic() - begin, 2)}
    write_json(result, folder / RESULT)
    return result


def final_figures(lines: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the figures after the last update, with mean_phi_gap over the whole run but its start: phi matters while particles move."""
    figures = {name: value for name, value in lines[-1].items() if name not in ("update", "phi_gap")}
    gaps = [line["phi_gap"] for line in lines[1:] if "phi_gap" in line]
    return figures | ({"mean_phi_gap": sum(gaps) / len(gaps)} if gaps else {})


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """Return the lines of a finished run's metrics.jsonl."""
    return [json.loads(line) for line in (folder / METRICS).read_text().splitlines()]


def read_trajectory(folder: Path) -> tuple[Tensor, list[int]]:
    """Return (S, n, D) particles and the S updates after which they were there."""
    tensors = read_tensors(folder / TRAJECTORY)
    return tensors["theta"], tensors["update"].tolist()


def write_json(content: dict[str, Any], file: Path) -> None:
    """Write JSON beside its file and rename it into place."""
    temporary = file.with_name(file.name + ".tmp")
    temporary.write_text(json.dumps(content, indent=1) + "\n")
    temporary.replace(file)
