"""Sweeps whose runs were never run: directories with figures and turntables, as runs leave them."""

import functools
import json
import math
import os
from pathlib import Path

from PIL import Image, ImageDraw

from dist_vsd.sweep.manifest import PlannedRun, SweepSettings, read_sweep, write_manifest, write_settings
from dist_vsd.sweep.plan import add_runs, expand
from dist_vsd.sweep.prompts import Prompt
from dist_vsd.sweep.state import RunState

# A prior of the hub, which planning does not ask for, so that prompts may hold any words.
ANY_WORDS = {"prior": "someone/model"}


def planned(path, prompts, variations=({},), seeds=(0,)):
    """Plan a sweep of prompts (texts, or Prompt)."""
    prompts = [prompt if isinstance(prompt, Prompt) else Prompt(text=prompt, source="prompts.txt") for prompt in prompts]
    settings = SweepSettings(name=Path(path).name)
    runs = expand(prompts, [ANY_WORDS | variation for variation in variations], list(seeds), settings)
    return add_runs(Path(path), settings, runs)[0]


def state_of(run, number):
    """Return a state: most runs are done, every eighth is in one of the others."""
    kind = ("running", "failed", "stopped", "waiting")[number // 8 % 4] if number % 8 == 7 else "done"
    update = {"done": 800, "running": 340, "failed": 120, "stopped": 500, "waiting": 0}[kind]
    error = "RuntimeError: phi differs between ranks 0 and 1 at update 120" if kind == "failed" else ""
    speed = {"seconds_per_update": 0.22} if kind == "running" else {}
    return RunState(run=run, state=kind, update=update, num_updates=800, error=error, **speed)


def write_run(run_dir, number, update, turntables):
    """Write what a run leaves: figures, an event, and its turntables (lists of PIL frames)."""
    run_dir.mkdir(parents=True)
    wave = math.sin(number)
    figures = {"phi/loss": 0.41 + 0.1 * wave, "theta/opacity": 0.13 + 0.02 * wave, "seconds/update": 0.22, "memory/peak_mib": 702.5}
    figures |= {"clip/score": 0.29 + 0.03 * math.cos(3 * number), "clip/r_precision": round(0.75 + 0.25 * wave, 2)}
    lines = [{"update": 10, "phi/loss": 1.0}, {"update": 20, "event": "a grid was written"}, {"update": update, **figures}]
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for particle, frames in enumerate(turntables):
        file = run_dir / "export" / f"turntable_{particle:04d}.gif"
        file.parent.mkdir(exist_ok=True)
        frames[0].save(file, save_all=True, append_images=frames[1:], duration=50, loop=0)


def plain_turntable(number, num_frames=20, size=64):
    """Return frames of a coloured ball that a dot goes round."""
    frames = []
    for i in range(num_frames):
        frame = Image.new("RGB", (size, size), "white")
        draw = ImageDraw.Draw(frame)
        draw.ellipse((12, 12, size - 12, size - 12), fill=f"hsl({number * 47 % 360}, 60%, 50%)")
        x = size / 2 + (size / 2 - 10) * math.cos(2 * math.pi * i / num_frames)
        draw.ellipse((x - 4, size / 2 - 4, x + 4, size / 2 + 4), fill="black")
        frames.append(frame)
    return frames


@functools.cache
def scene_turntable(name, color, seed, num_frames=16, size=112):
    """Return frames of one of the embedded prior's scenes."""
    import torch

    from dist_vsd.cameras import turntable
    from dist_vsd.image_files import to_bytes
    from dist_vsd.priors.embedded.render import render_object
    from dist_vsd.priors.embedded.scenes import NUM_PROPORTIONS

    proportions = torch.rand(1, NUM_PROPORTIONS, generator=torch.Generator().manual_seed(seed)) * 2 - 1
    cameras = turntable(num_frames, 15.0, 2.9, 41.0)
    images = render_object(name, [color] * num_frames, proportions.expand(num_frames, -1), cameras, size)
    return [Image.fromarray(image) for image in to_bytes(images)]


def ball_colors(directions):
    """Return the (N, 3) colours of a ball in (N, 3) unit directions from its centre: no two sides are alike."""
    return 0.5 + 0.4 * directions


def write_ball(file, num_subdivisions=4, texture_size=0, inside_out=False, center=(0.0, 0.1, 0.2), radius=0.6):
    """Write a GLB of a coloured ball, as runs leave one."""
    import numpy as np
    import torch
    import trimesh

    from dist_vsd.export.glb import write_glb
    from dist_vsd.export.mesh import MeshOptions, make_mesh
    from dist_vsd.export.surface import Surface

    ball, middle = trimesh.creation.icosphere(num_subdivisions), torch.tensor(center)
    sign = -1 if inside_out else 1
    places = (radius * ball.vertices + np.array(center)).astype(np.float32)
    surface = Surface(places, ball.faces.astype(np.int32), lambda points: ball_colors(sign * (points - middle) / radius))
    write_glb(make_mesh(surface, MeshOptions(texture_size=texture_size)), Path(file))


def ran(sweep, turntables_of=lambda number: [plain_turntable(number), plain_turntable(number + 1)]):
    """Write the directories of all runs that a state says have begun; return the states by id."""
    states = {}
    for number, run in enumerate(sweep.runs):
        state = states[run.id] = state_of(run, number)
        if state.update:
            write_run(sweep.run_dir(run), number, state.update, turntables_of(number) if state.state == "done" else [])
    return states


def plan_seeds(path, count):
    """Plan a prompt with many seeds, of 100 updates each."""
    write_settings(path, SweepSettings(name="ducks"))
    write_manifest(path, [PlannedRun(prompt="a green duck", seed=seed, overrides={"num_updates": 100}) for seed in range(count)])
    return read_sweep(path)


def write_ended(path, num_runs, num_ended):
    """Plan many runs and write the small files that ended ones leave: five have failed, the others are done, the rest never began."""
    sweep = plan_seeds(path, num_runs)
    for folder in ("leases", "attempts", "runs"):
        (path / folder).mkdir()
    for number, run in enumerate(sweep.runs[:num_ended]):
        word = f'{{"exit_code": {int(number < 5)}, "error": "boom"'
        os.makedirs(f"{path}/runs/{run.id}/checkpoints/update_00000100")
        texts = {
            f"runs/{run.id}/config.yaml": "num_updates: 100\n" + "field: 1\n" * 100,
            f"runs/{run.id}/outcome.json": word + ', "update": 100}',
            f"attempts/{run.id}.json": word + "}",
            f"leases/{run.id}.1": "{}",
        }
        for name, text in texts.items():
            with open(f"{path}/{name}", "w") as file:
                file.write(text)
        os.utime(f"{path}/leases/{run.id}.1", (0, 0))
