"""The words of `evaluate`: its flags and help, and what is refused before anything is loaded or written."""

from __future__ import annotations

import dataclasses
import math
import re
from pathlib import Path
from typing import Any

import tyro

from dist_vsd.commands.arguments import nearest_command
from dist_vsd.commands.help import Pages
from dist_vsd.evaluation.metric_names import METRICS, ONLY_WHEN_ASKED
from dist_vsd.evaluation.protocols.names import METHOD, PICTURE_SIZE, PROMPTS_OF, PROTOCOLS
from dist_vsd.runs.outcome import newest_update
from dist_vsd.sweep.manifest import SETTINGS_FILE, read_sweep

OF_METRICS = (
    "metrics", "clip", "dino", "lpips", "elevations", "num_azimuths", "sphere_subdivisions", "num_samples", "sample_guidance",
)  # fmt: skip
DESCRIPTION = """Evaluate runs, finished or stopped, by their newest valid checkpoints.

- clip: cosine of views and prompt
- r_precision: share of views to which the prompt is the nearest of --prompts, or of the embedded prior's captions, or of the runs' prompts
- entropy: of CLIP's predictions over that set: for a view (quality, low is sharp) and of their mean (variety)
- diversity: 1 - the mean cosine between two particles from the same camera, by CLIP
- multi_face: share of particles whose front is seen from more than one side
- recognition: object, colour and view that CLIP recognises; how evenly they are spread where the prompt leaves them open (embedded prior)
- overlap: intersection over union with the known scene (embedded prior)
- chamfer: distance of a mesh to the surface of the known scene, and how far their normals agree (embedded prior)
- t3bench: quality from all around: the best CLIP score, smoothed over neighbouring viewpoints
- dino, lpips: diversity by other features, whose weights are given
- samples: colours and views against those of the prior's own samples (embedded prior; takes a while)
- fid: Frechet distance of views and the prior's own samples (takes a while)

Without --metrics: all that the run and the given weights allow, but for samples and fid. Writes RUN_DIR/evaluation.json, of RUN_DIR@STAGE
evaluation_STAGE.json. A sweep's directory stands for its runs that have a checkpoint.

--protocol measures nothing: it writes what the scripts of a benchmark read, into the folder --out. What is complete there stays; the
same line again goes on.

- t3bench: textured meshes, and 162 x 5 views of each particle before black, 12 more for captions
- gpteval3d: 120 views of each particle, colours and normals"""

PAGES = Pages(
    examples="""Measure runs: CLIP score, R-precision, quality and variety, diversity, faces, recognition, overlap.

  dist-vsd evaluate runs/* --out table.csv
  dist-vsd evaluate runs/a-green-duck --metrics clip r_precision
  dist-vsd evaluate sweeps/prompts --protocol gpteval3d --prompts prompts.json    (pictures for another benchmark)""",
    everyday=("--metrics", "--prompts", "--clip", "--num-azimuths", "--elevations", "--protocol", "--out"),
    topics={
        "What is measured": ("--metrics", "--prompts", "--out"),
        "By which networks": ("--clip", "--dino", "--lpips"),
        "From where": ("--elevations", "--num-azimuths", "--sphere-subdivisions"),
        "Against the prior's own samples": ("--num-samples", "--sample-guidance"),
        "For other benchmarks": ("--protocol", "--method", "--size"),
    },
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluateArguments:
    """What `evaluate` takes."""

    run_dirs: tyro.conf.Positional[tuple[str, ...]]
    """Run directories, or RUN_DIR@STAGE: as that stage has left its particles; or directories of sweeps."""
    prompts: str = ""
    """A text file, a prompt a line: the set that R-precision is told from; the benchmark's own file, with --protocol."""
    metrics: tuple[str, ...] = ()
    """Out of clip, r_precision, entropy, diversity, multi_face, recognition, overlap, chamfer, t3bench, dino, lpips, samples and fid."""
    clip: str = ""
    """The folder of a transformers CLIPModel in safetensors, or a hub id; empty: the run's own --clip, else the one beside the prior."""
    dino: str = ""
    """Folder of a transformers DINO, DINOv2 or DINOv3 in safetensors."""
    lpips: str = ""
    """LPIPS's weights (AlexNet) as a safetensors file; dist_vsd/evaluation/lpips.py says how to save it."""
    elevations: tuple[float, ...] = (15.0,)
    """Of the turns from which 3D particles are looked at, degrees."""
    num_azimuths: int = 24
    """Views of each turn."""
    sphere_subdivisions: int = 1
    """Of t3bench's icosphere: 1 has 42 viewpoints, 2 (the benchmark's own) 162, at five focal lengths each."""
    num_samples: int = 64
    """Samples of the prior for each prompt, for samples and fid."""
    sample_guidance: float = 7.5
    """Their guidance scale, the same for all runs."""
    protocol: str = ""
    """t3bench or gpteval3d: write what that benchmark's scripts read, instead of measuring."""
    method: str = METHOD
    """Name of the method in the benchmark's folders."""
    size: int = PICTURE_SIZE
    """Height and width of the benchmark's pictures, pixels; another than its own 512 is for trials."""
    out: str = ""
    """File for the results of all runs: .csv or .json; with --protocol a folder, by default named as the benchmark."""

    def __post_init__(self) -> None:
        if not self.run_dirs:
            raise ValueError("no run directory is given: give the directories that `dist-vsd train` made")
        if self.protocol:
            self._check_protocol()
            return
        if others := [name for name in ("method", "size") if getattr(self, name) != self._default(name)]:
            raise ValueError(f"--{others[0]} says how --protocol names or writes pictures: give --protocol too, or leave it out")
        for name in self.metrics:
            if name not in METRICS:
                raise ValueError(f"--metrics must be out of {', '.join(METRICS)}, got {name!r}{nearest_command(name, METRICS)}")
        if not self.elevations or not all(-90 <= elevation <= 90 for elevation in self.elevations):
            raise ValueError(f"--elevations must be one or more numbers in [-90, 90], got {self.elevations}")
        if self.num_azimuths < 1:
            raise ValueError(f"--num-azimuths must be at least 1, got {self.num_azimuths}")
        if not 0 <= self.sphere_subdivisions <= 3:
            raise ValueError(f"--sphere-subdivisions must be 0 to 3, got {self.sphere_subdivisions}")
        if self.num_samples < 2:
            raise ValueError(f"--num-samples must be at least 2, got {self.num_samples}")
        if not 0.0 <= self.sample_guidance < math.inf:
            raise ValueError(f"--sample-guidance must be a number from 0 on, got {self.sample_guidance}: change it")
        if self.out and Path(self.out).suffix not in (".csv", ".json"):
            raise ValueError(f"--out must end in .csv or .json, got {self.out!r}")

    @property
    def wanted(self) -> tuple[str, ...]:
        """The metrics to try."""
        return tuple(dict.fromkeys(self.metrics)) or tuple(name for name in METRICS if name not in ONLY_WHEN_ASKED)

    def _check_protocol(self) -> None:
        """Refuse what does not go with a protocol; ValueError."""
        if self.protocol not in PROTOCOLS:
            near = nearest_command(self.protocol, PROTOCOLS)
            raise ValueError(f"--protocol must be one of {', '.join(PROTOCOLS)}, got {self.protocol!r}{near}")
        if others := [name for name in OF_METRICS if getattr(self, name) != self._default(name)]:
            flag = f"--{others[0].replace('_', '-')}"
            raise ValueError(f"{flag} is for metrics, --protocol {self.protocol} writes pictures alone: leave one of them out")
        if not self.prompts:
            raise ValueError(f"--protocol {self.protocol} needs --prompts FILE: {PROMPTS_OF[self.protocol]}, or one of your own")
        if not re.fullmatch(r"[A-Za-z0-9][\w.-]*", self.method, re.ASCII):
            raise ValueError(f"--method must be a name of letters, digits, _ . and -, got {self.method!r}: change it")
        if self.size < 1:
            raise ValueError(f"--size must be at least 1, got {self.size}: leave it out for the benchmark's own {PICTURE_SIZE}")
        if Path(self.out).suffix in (".csv", ".json"):
            raise ValueError(f"--out is a folder where --protocol is given, got {self.out!r}: name a folder")

    @classmethod
    def _default(cls, name: str) -> Any:
        return next(field.default for field in dataclasses.fields(cls) if field.name == name)


def run_dirs_of(names: tuple[str, ...]) -> tuple[list[Path], list[str]]:
    """Return the run directories that are meant, and lines to tell: a sweep's directory stands for its runs that have a checkpoint.

    Raises:
        ValueError: none of a sweep's runs has one, or the sweep can't be read.
    """
    found: dict[Path, None] = {}
    notes = []
    for path in map(Path, names):
        if not (path / SETTINGS_FILE).is_file():
            found[path] = None
            continue
        sweep = read_sweep(path)
        folders = [folder for folder in map(sweep.run_dir, sweep.runs) if newest_update(folder)]
        if not folders:
            raise ValueError(f"sweep {path} has no run with a checkpoint yet: submit it, or wait")
        if without := len(sweep.runs) - len(folders):
            notes.append(f"{without} of the {len(sweep.runs)} runs of {path} have no checkpoint yet, and are left out")
        found |= dict.fromkeys(folders)
    return list(found), notes
