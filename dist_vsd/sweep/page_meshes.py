"""The meshes of a page of results: small copies inside it as long as there is room, links to the runs' own files beyond that.

What runs leave of their solids (export/mesh_0000.glb) is half a megabyte and more; a copy of 3,000 faces is 55 kB and keeps the shape.
"""

from __future__ import annotations

import dataclasses
import os
import re
import tempfile
from pathlib import Path
from urllib.parse import quote

MOST_FACES = 3000
# Of the page, for all meshes, as it holds them: base64 takes a third more. Some 200 meshes; it is read before the page is whole.
MOST_BYTES = 16 << 20


@dataclasses.dataclass(frozen=True)
class PageMesh:
    """A particle's mesh.

    Attributes:
        particle: its number.
        glb: a copy of few faces, to stand in the page; None: the page links to the file.
        link: address of the run's own file from the page.
    """

    particle: int
    glb: bytes | None
    link: str


def meshes_of(run_dirs: list[Path], page_folder: Path, most_bytes: int) -> list[list[PageMesh]]:
    """Return the meshes of each run, by particle; a file that holds no mesh is left out.

    Each run's first particle comes before any run's second: there is one to see of as many runs as the room allows.

    Args:
        run_dirs: of the runs.
        page_folder: where the page will lie.
        most_bytes: for all copies together, in base64; 0: links alone.
    """
    files = [sorted((run_dir / "export").glob("mesh_[0-9][0-9][0-9][0-9].glb")) for run_dir in run_dirs]
    found: list[list[PageMesh]] = [[] for _ in run_dirs]
    for place in range(max(map(len, files), default=0)):
        for run, file in ((run, of_run[place]) for run, of_run in enumerate(files) if place < len(of_run)):
            glb = None
            if most_bytes > 0:
                try:
                    glb = _light_copy(file)
                except (OSError, ValueError):
                    continue
                most_bytes -= 4 * len(glb) // 3
                if most_bytes < 0:  # whatever comes now is not even read
                    glb = None
            link = quote(Path(os.path.relpath(file, page_folder)).as_posix())
            found[run].append(PageMesh(int(re.findall(r"\d+", file.stem)[-1]), glb, link))
    return found


def _light_copy(file: Path) -> bytes:
    """Return the copy, kept beside the file for the next time; a run directory that can't be written loses only that.

    Raises:
        ValueError: the file holds no mesh.
    """
    cache = file.with_name(f"preview_{file.stem}_{MOST_FACES}.glb")
    try:
        if cache.stat().st_mtime_ns >= file.stat().st_mtime_ns:
            return cache.read_bytes()
    except OSError:
        pass
    from dist_vsd.export.light_glb import write_light_glb  # its libraries take a second

    with tempfile.TemporaryDirectory() as folder:
        write_light_glb(file.read_bytes(), MOST_FACES, Path(folder) / cache.name)
        glb = (Path(folder) / cache.name).read_bytes()
    temporary = cache.with_name(f".{cache.name}.{os.getpid()}")
    try:
        temporary.write_bytes(glb)
        temporary.replace(cache)
    except OSError:
        temporary.unlink(missing_ok=True)
    return glb
