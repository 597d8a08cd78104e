"""One HTML page of a sweep's results, complete in itself: data, pictures, style and script, and nothing from anywhere else.

What comes from users reaches the page as JSON in a block that no browser runs, without a character that markup is made of; the
page's script puts it into elements as text only. A content security policy allows the page's own script and style, by their hashes.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any
from urllib.parse import quote

from dist_vsd.sweep.manifest import Sweep
from dist_vsd.sweep.page_meshes import MOST_BYTES, PageMesh, meshes_of
from dist_vsd.sweep.preview import Preview
from dist_vsd.sweep.results import Result, metric_names

TEMPLATE, VIEWER = Path(__file__).with_name("page.html"), Path(__file__).with_name("mesh_viewer.js")
# JSON stays JSON, and holds no tag, comment or entity; json.dumps escapes everything beyond ASCII, U+2028 with it.
_ESCAPES = {"<": "\\u003c", ">": "\\u003e", "&": "\\u0026"}


def write_page(file: Path, sweep: Sweep, results: list[Result], previews: Callable[[Result], Preview | None], *, link_media: bool) -> None:
    """Write the page, and with ``link_media`` its pictures beside it.

    Args:
        file: of the page.
        sweep: that was collected.
        results: of its runs.
        previews: gives a run's preview; called once a run, and its pictures are not kept.
        link_media: pictures as files in media/ beside the page, and meshes as links to the runs' own, instead of inside it.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    runs, blocks = [], []
    meshes = meshes_of([sweep.run_dir(result.run) for result in results], file.parent, 0 if link_media else MOST_BYTES)
    for number, result in enumerate(results):
        preview, where = previews(result), ""
        if preview and link_media:
            where = f"media/{result.run.id}.webp"
            _replace(file.parent / where, preview.webp)
        elif preview:
            blocks.append(_block(f"media-{number}", preview.webp))
        blocks += [_block(f"mesh-{number}-{mesh.particle}", mesh.glb) for mesh in meshes[number] if mesh.glb is not None]
        runs.append(_run(result, preview, quote(where), meshes[number]))
    content = {"sweep": sweep.settings.name, "preset": sweep.settings.preset, "metrics": metric_names(results), "runs": runs}
    loads_meshes = any(mesh.glb is None for of_run in meshes for mesh in of_run)
    template = TEMPLATE.read_text(encoding="utf-8").replace("{{viewer}}", VIEWER.read_text(encoding="utf-8"))
    _replace(file, "".join(_fill(template, content, blocks, link_media, loads_meshes)).encode())


def _block(name: str, content: bytes) -> str:
    """Return what no browser runs or shows, for the page's script to find."""
    return f'<script type="text/plain" id="{name}">{base64.b64encode(content).decode()}</script>\n'


def _run(result: Result, preview: Preview | None, media: str, meshes: list[PageMesh]) -> dict[str, Any]:
    run, state = result.run, result.state
    picture = preview and {"frames": preview.num_frames, "particles": preview.num_particles, "of": preview.of_particles, "file": media}
    return {
        "id": run.id,
        "prompt": run.prompt,
        "seed": run.seed,
        "tags": list(run.tags),
        "settings": result.settings,
        "state": state.state,
        "update": state.update,
        "num_updates": state.num_updates,
        "updates_per_second": state.updates_per_second,
        "seconds_left": state.seconds_left,
        "error": state.error,
        "note": state.note,
        "figures": result.figures,
        "picture": picture,
        "meshes": [{"particle": mesh.particle, "file": "" if mesh.glb is not None else mesh.link} for mesh in meshes],
    }


def _fill(template: str, content: dict[str, Any], blocks: list[str], link_media: bool, loads_meshes: bool) -> Iterable[str]:
    """Yield the parts of the page; what is filled in is never searched for a mark again."""
    files = " 'self' file:" if link_media else ""
    policy = f"default-src 'none'; script-src {_hash(template, 'script')}; style-src {_hash(template, 'style')}; img-src data:{files}; "
    policy += "connect-src 'self'; " if loads_meshes else ""
    policy += "base-uri 'none'; form-action 'none'"
    marks = {"{{policy}}": policy, "{{runs}}": to_inert_json(content), "{{media}}": "".join(blocks)}
    for part in re.split(r"(\{\{\w+\}\})", template):
        yield marks.get(part, part)


def _hash(template: str, element: str) -> str:
    """Return the hash by which a content security policy knows the template's one inline script or style."""
    inner = template.partition(f"<{element}>")[2].partition(f"</{element}>")[0]
    assert inner, element
    return f"'sha256-{base64.b64encode(hashlib.sha256(inner.encode()).digest()).decode()}'"


def to_inert_json(content: Any) -> str:
    """Write JSON that can stand in a script block whatever text it holds."""
    text = json.dumps(content, allow_nan=False, separators=(",", ":"))
    return re.sub("[<>&]", lambda match: _ESCAPES[match[0]], text)


def _replace(file: Path, content: bytes) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(f".{file.name}.tmp")
    temporary.write_bytes(content)
    temporary.replace(file)
