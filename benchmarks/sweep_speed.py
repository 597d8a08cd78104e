"""How fast sweeps are handled: planning 10,000 runs and their status, collecting 500, and opening their page in Chromium.

    python benchmarks/sweep_speed.py                          writes benchmarks/results/sweep_speed.json
    python benchmarks/sweep_speed.py --picture results.html   draws a page into docs/sweep_page.png instead

The sweeps are synthetic: their runs' figures are made up, their turntables are scenes that the embedded prior was trained on.
"""

from __future__ import annotations

import argparse
import io
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from dist_vsd.priors.embedded.captions import all_pairs, caption  # noqa: E402
from dist_vsd.scaling.machine import Places, commit_of_package, describe_machine  # noqa: E402
from dist_vsd.sweep.manifest import read_sweep  # noqa: E402
from dist_vsd.sweep.page import write_page  # noqa: E402
from dist_vsd.sweep.preview import preview_of  # noqa: E402
from dist_vsd.sweep.results import collect  # noqa: E402
from tests.browser import install_chromium, start_chromium  # noqa: E402
from tests.synthetic_sweep import planned, ran, scene_turntable, write_ended  # noqa: E402

REPEATS = 3
OBJECTIVES = [{"objective": "vsd", "guidance_scale": 7.5}, {"objective": "sds", "guidance_scale": 30.0}]


def seconds_of(action: Callable[[], Any]) -> float:
    begin = time.perf_counter()
    action()
    return time.perf_counter() - begin


def repeated(measure: Callable[[], float]) -> dict[str, float]:
    """Measure several times; return the median and the range."""
    seconds = [measure() for _ in range(REPEATS)]
    return {"median_s": round(statistics.median(seconds), 2), "min_s": round(min(seconds), 2), "max_s": round(max(seconds), 2)}


def plan_runs(folder: Path) -> dict[str, Any]:
    """Time `dist-vsd sweep plan` of 10,000 new runs, as a process: of a few settings, and of settings of each prompt's own."""
    views, names = ("front view", "side view", "back view", "overhead view"), [caption(*pair) for pair in all_pairs()]
    few, own = folder / "few.txt", folder / "own.jsonl"
    prompts = [f"{name}, {view}, {other}" for name in names for view in views for other in views]
    few.write_text("\n".join(prompts[:1250]))
    lines = [{"prompt": names[i % len(names)], "overrides": {"guidance_scale": 7 + i / 1e4}} for i in range(10_000)]
    own.write_text("".join(json.dumps(line) + "\n" for line in lines))
    words = {"few settings": [few, "--seeds", "0,1", "--set", "objective=vsd,sds", "--set", "score.rank=4,8"], "settings a prompt": [own]}
    found: dict[str, Any] = {"num_runs": 10_000}
    for name, arguments in words.items():
        sweeps = iter(range(REPEATS))

        def plan(name=name, arguments=arguments, sweeps=sweeps):
            sweep = folder / f"{name.replace(' ', '-')}-{next(sweeps)}"
            command = [sys.executable, "-m", "dist_vsd", "sweep", "plan", *map(str, arguments), "--sweep-dir", str(sweep)]
            seconds = seconds_of(lambda: subprocess.run(command, check=True, cwd=ROOT, stdout=subprocess.DEVNULL))
            assert len(read_sweep(sweep).runs) == 10_000
            return seconds

        found[name] = repeated(plan)
    return found


def turntables_of(sweep) -> Callable[[int], list]:
    """Return what gives a run two turntables of what its prompt says."""

    def turntables(number):
        run = sweep.runs[number]
        color, name = run.prompt.split(",")[0].split()[1:]
        return [scene_turntable(name, color, 2 * (run.seed % 2) + particle) for particle in range(2)]

    return turntables


def open_page(folder: Path) -> dict[str, Any]:
    """Time collecting 500 runs, and opening their page, pictures inside it and beside it: to its load event, and to the first cards."""
    prompts = [caption(*pair) for pair in all_pairs()[::8]]
    sweep = planned(folder / "page", prompts, OBJECTIVES, range(21))
    del sweep.runs[500:]
    states = ran(sweep, turntables_of(sweep))
    found: dict[str, Any] = {"num_runs": len(sweep.runs)}
    driver = start_chromium()
    for kind, linked in (("inside", False), ("beside", True)):
        file = folder / kind / "results.html"

        def write(file=file, linked=linked):
            results = collect(sweep, states)
            write_page(file, sweep, results, lambda result: preview_of(sweep.run_dir(result.run)), link_media=linked)

        found[f"collect, pictures {kind}, {'again' if linked else 'first'}"] = {"median_s": round(seconds_of(write), 2)}
        loads, ready = [], []
        for _ in range(REPEATS):
            driver.get("about:blank")
            driver.get(file.as_uri())
            loads.append(driver.execute_script("return performance.timing.loadEventEnd - performance.timing.navigationStart") / 1e3)
            ready.append(float(driver.execute_script("return document.documentElement.dataset.ready")) / 1e3)
        found[f"page, pictures {kind}"] = {
            "bytes": file.stat().st_size,
            "load": repeated(iter(loads).__next__),
            "first cards": repeated(iter(ready).__next__),
        }
    driver.quit()
    return found


def status_of_runs(folder: Path) -> dict[str, Any]:
    """Time `dist-vsd sweep status` of 10,000 runs, 9,000 of them ended, as a process."""
    write_ended(folder, 10_000, 9_000)
    command = [sys.executable, "-m", "dist_vsd", "sweep", "status", str(folder)]

    def show():
        subprocess.run(command, cwd=ROOT, check=True, capture_output=True)

    return {"num_runs": 10_000, "status": repeated(lambda: seconds_of(show))}


def draw_picture(page: Path, file: Path) -> None:
    """Draw a results page: cards in light, the same prompt side by side in dark, and a phone."""
    from PIL import Image

    driver = start_chromium()
    views = [((1040, 800), "light", False), ((1040, 620), "dark", True), ((390, 1420), "light", False)]
    shots = []
    for (width, height), scheme, compare in views:
        driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": scheme}]})
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        driver.get(page.absolute().as_uri())
        if compare:
            driver.find_element("id", "as-groups").click()
        driver.execute_script("turn(false); for (const media of document.querySelectorAll('.media')) showFrame(media, 2 / 16)")
        time.sleep(0.5)
        shots.append(Image.open(io.BytesIO(driver.get_screenshot_as_png())).convert("RGB"))
    driver.quit()
    picture = Image.new("RGB", (1040 + 390, 1420), "white")
    for shot, place in zip(shots, ((0, 0), (0, 800), (1040, 0)), strict=True):
        picture.paste(shot, place)
    picture.quantize(255, kmeans=4, dither=Image.Dither.NONE).save(file, optimize=True)


MEASUREMENTS = {"plan": plan_runs, "status": status_of_runs, "page": open_page}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=MEASUREMENTS, help="one of the measurements; the others' figures are kept")
    parser.add_argument("--picture", type=Path, help="a results page to draw into docs/sweep_page.png, instead of measuring")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "sweep_speed.json")
    arguments = parser.parse_args()
    reason = install_chromium()
    if reason:
        parser.error(reason)
    if arguments.picture:
        draw_picture(arguments.picture, ROOT / "docs" / "sweep_page.png")
        return
    with tempfile.TemporaryDirectory() as folder:
        record = json.loads(arguments.out.read_text()) if arguments.out.exists() else {}
        for name in [arguments.only] if arguments.only else MEASUREMENTS:
            work = Path(folder) / name
            work.mkdir()
            figures = MEASUREMENTS[name](work)
            record[name] = {"commit": commit_of_package(), "machine": describe_machine(Places.of_this_machine(0)), **figures}
            print(json.dumps({name: record[name]}, indent=1), flush=True)
    arguments.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
