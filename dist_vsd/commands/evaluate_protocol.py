"""`dist-vsd evaluate --protocol`: pictures and meshes as other benchmarks' scripts read them."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dist_vsd.evaluation.protocols.names import GPTEVAL3D, T3BENCH
from dist_vsd.evaluation.protocols.prompt_set import place_of, read_prompt_set
from dist_vsd.runs.run_directory import split_stage
from dist_vsd.writable import require_writable_folder

if TYPE_CHECKING:
    from dist_vsd.particles.particle import Particle
    from dist_vsd.runs.saved_run import SavedRun
    from dist_vsd.scaling.fit import SizeFlag
    from dist_vsd.scaling.memory import Memory

PIXEL_BYTES = 12  # three colours, fp32


@dataclasses.dataclass(frozen=True)
class Job:
    """The particles of one run, and where they go.

    Attributes:
        folder: of the run, as it was named.
        seeds: the number of each particle among those of its prompt, by its id.
        name_of: gives the name of a particle's folder by that number, and for T3Bench by its kind.
    """

    folder: Path
    seeds: dict[int, int]
    name_of: Callable[..., str]


def run_protocol(protocol: str, method: str, size: int, prompts: Path, root: Path, folders: list[Path], notes: list[str]) -> None:
    """Write what a benchmark takes of runs; what is complete stays.

    Args:
        protocol: out of PROTOCOLS.
        method: its name in the benchmark's folders.
        size: height and width of the pictures, pixels.
        prompts: the benchmark's file of them.
        root: the folder to write into.
        folders: run directories, or RUN_DIR@STAGE.
        notes: lines to tell first.

    Raises:
        ValueError: a run, its prompt or its particles do not fit the benchmark, or something in the way is not ours.
    """
    require_writable_folder(root, f"--out {str(root)!r}")
    texts = read_prompt_set(prompts)

    from dist_vsd.device import best_device
    from dist_vsd.runs.saved_run import open_run
    from dist_vsd.scaling.memory import Memory, telling_out_of_memory

    device = best_device()
    memory = Memory.of(device)
    checked = [open_run(folder, (0,)) for folder in folders]  # the particles themselves are read one run at a time
    for folder, saved in zip(folders, checked, strict=True):
        require_shown(protocol, folder, saved)
    jobs = plan(protocol, method, prompts, texts, root, folders, checked)
    flag = size_flag(size, checked[0])
    flag.require_fit(memory)
    for note in [*notes, *(note for saved in checked for note in saved.notes)]:
        print(note)
    total = sum(len(job.seeds) for job in jobs)
    done = 0
    with telling_out_of_memory(memory, flag.advice):
        for job in jobs:
            saved = open_run(job.folder, device=device)
            for particle, theta in saved.particles.items():
                done += 1
                told = write_particle(protocol, root, job, saved, particle, theta, size, memory)
                print(f"{done}/{total}  {job.folder} particle {particle}: {told}", flush=True)
    covered = {saved.config.prompt for saved in checked}
    print(f"{root} has particles of {len(covered)} of the {len(texts)} prompts of {prompts}")


def require_shown(protocol: str, folder: Path, saved: SavedRun) -> None:
    """Refuse particles that a benchmark can't look at; ValueError."""
    from dist_vsd.particles.representations import REPRESENTATIONS

    row, kind = saved.config.representation_row, saved.config.representation
    if protocol == GPTEVAL3D and "normal" not in row.shows:
        served = " or ".join(name for name, other in REPRESENTATIONS.items() if "normal" in other.shows)
        raise ValueError(f"{folder} holds {kind} particles, which show no normals; --protocol {protocol} needs {served}: leave it out")
    if protocol == T3BENCH and not row.is_solid:
        served = " or ".join(name for name, other in REPRESENTATIONS.items() if other.is_solid)
        raise ValueError(f"{folder} holds {kind} particles, which have no surface; --protocol {protocol} needs {served}: leave it out")
    if protocol == T3BENCH:
        from dist_vsd.export.atlas import require_xatlas

        require_xatlas()


def plan(
    protocol: str, method: str, prompts: Path, texts: tuple[str, ...], root: Path, folders: list[Path], checked: list[SavedRun]
) -> list[Job]:
    """Deal the numbers of each prompt to the particles of all runs; see slots_of.

    Raises:
        ValueError: a prompt is not the benchmark's, or can't be the name of a folder, or something in the way is not ours.
    """
    from dist_vsd.evaluation.protocols import gpteval3d, t3bench
    from dist_vsd.evaluation.protocols.folders import slots_of

    owners: dict[str, list[str]] = {}
    for folder, saved in zip(folders, checked, strict=True):
        prompt = saved.config.prompt
        place_of(prompt, texts, str(folder), str(prompts))
        if protocol == T3BENCH:
            t3bench.require_name(prompt)
        owners.setdefault(prompt, []).extend(owner_of(folder, particle) for particle in range(saved.config.num_particles))

    def names_of(prompt: str) -> Callable[..., str]:
        if protocol == GPTEVAL3D:
            return lambda seed: gpteval3d.folder_name(method, texts.index(prompt), seed)
        group = t3bench.group_of(prompts)
        return lambda seed, kind=t3bench.MESHES: t3bench.folder_name(kind, method, group, prompt, seed)

    seeds = {prompt: slots_of(root, names_of(prompt), named) for prompt, named in owners.items()}
    return [
        Job(
            folder,
            {particle: seeds[saved.config.prompt][owner_of(folder, particle)] for particle in range(saved.config.num_particles)},
            names_of(saved.config.prompt),
        )
        for folder, saved in zip(folders, checked, strict=True)
    ]


def owner_of(folder: Path, particle: int) -> str:
    """Return by what a particle is known again: its run's directory, the stage that was asked for, and its id."""
    directory, stage = split_stage(folder)
    return f"{directory.resolve()}@{stage} {particle}"


def write_particle(
    protocol: str, root: Path, job: Job, saved: SavedRun, particle: int, theta: Particle, size: int, memory: Memory
) -> str:
    """Write what a benchmark takes of one particle, as far as it is not complete; return what is to be told of it."""
    from dist_vsd.evaluation.protocols import gpteval3d, t3bench
    from dist_vsd.evaluation.protocols.folders import Folder, digest_of

    seed, config = job.seeds[particle], saved.config
    record: dict[str, Any] = {
        "owner": owner_of(job.folder, particle), "prompt": config.prompt, "particle": particle, "update": saved.update, "size": size,
        "sha256": digest_of(theta),
    }  # fmt: skip
    label = f"{job.folder} particle {particle}"
    if protocol == GPTEVAL3D:
        folder = Folder(root, job.name_of(seed), record)
        if folder.is_complete():
            return f"{folder.path} is complete"
        with progress(label, gpteval3d.NUM_VIEWS) as tell:
            gpteval3d.write(folder, theta, config.camera, size, tell)
        return str(folder.path)
    kinds = (t3bench.MESHES, t3bench.VIEWS, t3bench.CAPTIONS)
    meshes, views, captions = (Folder(root, job.name_of(seed, kind), record) for kind in kinds)
    if all(folder.is_complete() for folder in (meshes, views, captions)):
        return f"{meshes.path} is complete"
    if not meshes.is_complete():
        t3bench.write_mesh(meshes, theta, config, saved.update, memory.free)
    with progress(label, len(t3bench.view_names()) + len(t3bench.caption_names())) as tell:
        t3bench.write_all_views(meshes, views, captions, theta, size, tell)
    reason = t3bench.why_no_mesh(meshes)
    return f"{meshes.path}{f', black, as there is no surface: {reason}' if reason else ''}"


def size_flag(size: int, saved: SavedRun) -> SizeFlag:
    """Return what decides the memory: one render's way with its normals, and its pictures thrice."""
    from dist_vsd.scaling.fit import SizeFlag, measure_render

    held = measure_render(next(iter(saved.particles.values())), saved.config, False, "normal")
    return SizeFlag("--size", size, lambda pixels: held.at(pixels) + 6 * PIXEL_BYTES * pixels**2)


@contextlib.contextmanager
def progress(label: str, num_views: int) -> Iterator[Callable[[], None]]:
    """Show views as a bar on a terminal; yields what to call after each."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

    console = Console(stderr=True)
    if not console.is_terminal:
        yield lambda: None
        return
    with Progress("{task.description}", BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), console=console, transient=True) as bar:
        task = bar.add_task(label, total=num_views)
        yield lambda: bar.advance(task)
