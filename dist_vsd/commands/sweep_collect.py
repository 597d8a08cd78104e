"""`dist-vsd sweep collect`: results.csv and one page of a sweep."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import tyro

from dist_vsd.commands.arguments import parse
from dist_vsd.writable import require_writable_file

DESCRIPTION = """Collect the results of a sweep, finished or not, into a table (results.csv) and one page (results.html).

The page needs no network and no other file: send it as it is. It shows each run's turntables and figures, filters and sorts them,
and puts runs of the same prompt side by side. Figures are the last ones of each run's metrics.jsonl."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class SweepCollectArguments:
    """What `sweep collect` takes."""

    sweep_dir: tyro.conf.Positional[str]
    """The sweep's directory."""
    out: str = ""
    """Folder for the files; empty: SWEEP_DIR/results."""
    link_media: bool = False
    """Put pictures into files in media/ beside the page instead of inside it: a small page for thousands of runs."""


def run_collect(arguments: list[str]) -> int:
    """Run the command; see cli.main for the exit codes."""
    parsed = parse(SweepCollectArguments, arguments, "sweep collect", DESCRIPTION)

    from dist_vsd.sweep.faces import faces_of
    from dist_vsd.sweep.manifest import read_sweep
    from dist_vsd.sweep.page import write_page
    from dist_vsd.sweep.preview import preview_of
    from dist_vsd.sweep.results import collect, to_csv
    from dist_vsd.sweep.state import states_of

    sweep = read_sweep(Path(parsed.sweep_dir))
    folder = Path(parsed.out) if parsed.out else sweep.path / "results"
    table, page = folder / "results.csv", folder / "results.html"
    for file in (table, page, *([folder / "media" / "0.webp"] if parsed.link_media else [])):
        require_writable_file(file, f"--out {str(folder)!r}")
    states = states_of(sweep)
    results = collect(sweep, states)
    folder.mkdir(parents=True, exist_ok=True)
    table.write_text(to_csv(results), encoding="utf-8")
    write_page(page, sweep, results, lambda result: preview_of(sweep.run_dir(result.run)), link_media=parsed.link_media)
    done = sum(result.state.state == "done" for result in results)
    print(f"{len(results)} run(s), {done} of them done:\n  {table}\n  {page}")
    if faces := faces_of(sweep, states):
        print(faces.line())
    return 0
