"""What a mesh takes by the resolution of its lattice: main memory, and seconds on one core.

    python benchmarks/mesh_lattice.py

For each resolution a process of its own begins a mesh from the untrained field of the preset `embedded` (a soft ball), renders four views
at 512 pixels with colours, normals and both regularisers, goes back through them, and lets the band follow. Writes
benchmarks/results/mesh_lattice.json.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path

import torch

from dist_vsd.cameras import turntable
from dist_vsd.particles.mesh import MeshParticle
from dist_vsd.particles.owned_particle import OwnedParticle
from dist_vsd.particles.particle_configs import MeshConfig, MeshSettings, RadianceFieldConfig
from dist_vsd.particles.radiance_field import RadianceField

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "mesh_lattice.json"
RESOLUTIONS, PIXELS, NUM_VIEWS = (32, 64, 128, 256), 512, 4


def measure(resolution: int) -> dict[str, float]:
    """Return figures of one lattice, in this process."""
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    field = RadianceField(RadianceFieldConfig(), generator)
    field.after_update(0, generator)
    seconds: dict[str, float] = {}

    def timed(name: str, began: float) -> None:
        seconds[name] = time.process_time() - began

    began = time.process_time()
    theta = MeshParticle.from_particle(MeshSettings(MeshConfig(resolution=resolution), RadianceFieldConfig()), field, generator)
    timed("begin", began)
    owned = OwnedParticle.of(0, theta)
    began = time.process_time()
    render = theta.render(turntable(NUM_VIEWS, 15.0, 2.9, 41.0), PIXELS)
    timed("render", began)
    began = time.process_time()
    penalty = sum(regularizer() for regularizer in render.regularizers.values())
    (render.image.mean() + render.channel("normal").mean() + penalty).backward()
    owned.optimizer.step()
    timed("backward_and_step", began)
    began = time.process_time()
    theta.after_update(1, generator, owned.optimizer)
    timed("band", began)
    kept, faces = len(theta.vertices), len(theta.surface()[1])
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    sizes = {"resolution": resolution, "vertices_kept": kept, "faces": faces, "peak_gib": peak}
    return sizes | {f"{name}_cpu_s": value for name, value in seconds.items()}


def main() -> None:
    if len(sys.argv) > 1:
        print(json.dumps(measure(int(sys.argv[1]))))
        return
    rows = []
    for resolution in RESOLUTIONS:
        done = subprocess.run([sys.executable, __file__, str(resolution)], check=True, capture_output=True, text=True, cwd=ROOT)
        rows.append(json.loads(done.stdout.splitlines()[-1]))
        print(rows[-1], flush=True)
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=ROOT).stdout.strip()
    machine = f"{os.cpu_count()} cores, torch {torch.__version__}"
    record = {"commit": commit, "machine": machine, "pixels": PIXELS, "views": NUM_VIEWS, "rows": rows}
    RESULTS.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
