"""Collecting a sweep: the table, the previews, and the page of results in a real browser."""

import csv
import functools
import http.server
import io
import json
import math
import os
import threading
import time

import numpy as np
import pytest
import torch
from PIL import Image

from dist_vsd.cameras import cast_rays, look_at_origin
from dist_vsd.cli import main
from dist_vsd.image_files import write_mp4
from dist_vsd.sweep.manifest import read_sweep
from dist_vsd.sweep.page import to_inert_json, write_page
from dist_vsd.sweep.preview import CACHE_FILE, MOST_PARTICLES, NUM_FRAMES, SIZE, preview_of
from dist_vsd.sweep.prompts import Prompt
from dist_vsd.sweep.results import collect, read_figures, to_csv
from tests.browser import WEBGL, install_chromium, start_chromium
from tests.runs import unavailable
from tests.synthetic_sweep import ball_colors, plain_turntable, planned, ran, state_of, write_ball, write_run
from tests.test_sweep_prompts import ODD_PROMPTS

HOSTILE = [
    "<script>document.title = 'owned'; window.owned = 1</script>",
    "</script><img src=x onerror=\"window.owned = 1\"> <!-- ",
    "{{media}} ]]> \u2028 \" ' &lt;b&gt;",
]
WORDS = ["a green duck", "a red car", "a blue house", "a green tree", "a white snowman"]
PROMPTS = [*WORDS, *HOSTILE, "=1+1", "x" * 5000, "緑のアヒル 🦆", *(f"thing number {i}" for i in range(9))]


@pytest.fixture(scope="module")
def swept(tmp_path_factory):
    """A sweep of 80 runs, their states and results, and the folder of its page."""
    folder = tmp_path_factory.mktemp("swept")
    prompts = [Prompt(text=prompt, source="p.txt", tags=("animals",) if "duck" in prompt else ()) for prompt in PROMPTS]
    sweep = planned(folder / "s", prompts, [{"objective": "vsd", "score.rank": 2}, {"objective": "sds", "score.rank": 4}], (0, 1))
    results = collect(sweep, ran(sweep))
    for number in (0, 4, 5):
        write_ball(sweep.run_dir(sweep.runs[number]) / "export" / "mesh_0000.glb", num_subdivisions=1)
    for linked in (False, True):
        file = folder / ("linked" if linked else "inline") / "results.html"
        write_page(file, sweep, results, lambda result: preview_of(sweep.run_dir(result.run)), link_media=linked)
    return sweep, results, folder


def rows_of(text):
    return list(csv.DictReader(io.StringIO(text, newline="")))


def test_the_table_has_a_row_for_each_run_with_its_settings_and_last_figures(swept):
    _, results, _ = swept
    rows = rows_of(to_csv(results))
    assert [row["id"] for row in rows] == [result.run.id for result in results]
    assert (rows[0]["prompt"], rows[0]["objective"], rows[0]["score.rank"], rows[0]["state"]) == ("a green duck", "vsd", "2", "done")
    assert (rows[0]["tags"], rows[0]["update"], rows[0]["phi/loss"]) == ("animals", "800", "0.41")
    failed = next(row for row in rows if row["state"] == "failed")
    assert "phi differs between ranks" in failed["error"]
    waiting = next(row for row in rows if row["state"] == "waiting")
    assert (waiting["update"], waiting["phi/loss"]) == ("0", "")


def test_a_prompt_of_the_table_is_no_formula_and_else_as_it_is(tmp_path):
    dangerous = ["=1+1", "+1", "-rf", "@SUM(A1)", "=\u30b5"]
    sweep = planned(tmp_path / "s", [*dangerous, *(prompt for prompt in ODD_PROMPTS if prompt not in ("=HYPERLINK(1)", "-rf"))])
    rows = rows_of(to_csv(collect(sweep, {run.id: state_of(run, 0) for run in sweep.runs})))
    found = [row["prompt"] for row in rows]
    assert found[: len(dangerous)] == ["'" + prompt for prompt in dangerous]
    assert found[len(dangerous) :] == [run.prompt for run in sweep.runs[len(dangerous) :]]


def test_figures_are_the_last_numbers_of_whole_lines(tmp_path):
    file = tmp_path / "metrics.jsonl"
    lines = ['{"update": 1, "a/b": 1, "c/d": 2}', '{"update": 2, "a/b": 3.5, "e/f": null, "g/h": true}', '{"update": 3, "event": "x"}']
    file.write_text("\n".join([*lines, "[]", "7", '{"update": 4, "a/b": NaN}', '{"update": 5, "a/b": 1e999}', '{"update": 6, "a/']))
    assert read_figures(file) == {"a/b": 3.5, "c/d": 2}
    assert read_figures(tmp_path / "absent.jsonl") == {}


def pixels(webp):
    return Image.open(io.BytesIO(webp)).convert("RGB")


def test_a_preview_has_a_row_for_each_particle_and_a_column_for_each_frame(tmp_path):
    write_run(tmp_path / "run", 0, 800, [plain_turntable(i) for i in range(6)])
    preview = preview_of(tmp_path / "run")
    assert (preview.num_frames, preview.num_particles, preview.of_particles) == (NUM_FRAMES, MOST_PARTICLES, 6)
    strip = pixels(preview.webp)
    assert strip.size == (SIZE * NUM_FRAMES, SIZE * MOST_PARTICLES)
    hues = [strip.getpixel((SIZE * 9 // 2, SIZE * row + SIZE // 4)) for row in range(MOST_PARTICLES)]
    assert len(set(hues)) == MOST_PARTICLES
    # The dot goes round: right in the first frame, left in the one half-way.
    assert max(strip.getpixel((SIZE - SIZE // 6, SIZE // 2))) < 80 < max(strip.getpixel((SIZE // 6, SIZE // 2)))
    assert max(strip.getpixel((SIZE * 8 + SIZE // 6, SIZE // 2))) < 80
    assert len(preview.webp) < 40_000


def test_a_second_collect_takes_previews_from_the_export_folder_until_a_turntable_changes(tmp_path):
    write_run(tmp_path / "run", 0, 800, [plain_turntable(0)])
    first, cache = preview_of(tmp_path / "run"), tmp_path / "run" / "export" / CACHE_FILE
    written = cache.stat().st_mtime_ns
    assert preview_of(tmp_path / "run") == first
    assert cache.stat().st_mtime_ns == written
    later = time.time() + 10
    plain_turntable(5)[0].save(tmp_path / "run" / "export" / "turntable_0000.gif")
    os.utime(tmp_path / "run" / "export" / "turntable_0000.gif", (later, later))
    assert preview_of(tmp_path / "run").num_frames == 1


def test_turntables_of_other_kinds_and_grids_give_previews_too(tmp_path):
    import torch

    frames = torch.rand(24, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    (tmp_path / "mp4" / "export").mkdir(parents=True)
    write_mp4(frames, tmp_path / "mp4" / "export" / "turntable_0000.mp4", 20.0)
    assert preview_of(tmp_path / "mp4").num_frames == NUM_FRAMES
    (tmp_path / "png" / "export").mkdir(parents=True)
    Image.new("RGB", (8 * 64, 64)).save(tmp_path / "png" / "export" / "turntable_0000.png")
    assert preview_of(tmp_path / "png").num_frames == 8
    (tmp_path / "grid" / "renders").mkdir(parents=True)
    for update in (200, 400):
        Image.new("RGB", (6 * 64, 3 * 64)).save(tmp_path / "grid" / "renders" / f"update_{update:08d}_particles_0000-0002.png")
    preview = preview_of(tmp_path / "grid")
    assert (preview.num_frames, preview.num_particles, preview.of_particles) == (6, 3, 3)


def test_a_run_without_a_whole_picture_has_no_preview(tmp_path):
    assert preview_of(tmp_path / "absent") is None
    write_run(tmp_path / "run", 0, 800, [plain_turntable(0)])
    file = tmp_path / "run" / "export" / "turntable_0000.gif"
    file.write_bytes(file.read_bytes()[:100])
    assert preview_of(tmp_path / "run") is None
    file.write_text("no picture")
    assert preview_of(tmp_path / "run") is None


def test_json_in_the_page_holds_no_markup_and_stays_the_same():
    content = {"prompts": [*HOSTILE, *ODD_PROMPTS, "<!--", "]]>", "\u2029"]}
    text = to_inert_json(content)
    assert not set("<>&\u2028\u2029") & set(text)
    assert json.loads(text) == content


def test_collect_writes_the_table_and_the_page_of_a_sweep_that_has_hardly_begun(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    sweep = planned(tmp_path / "s", WORDS)
    write_run(sweep.run_dir(sweep.runs[0]), 0, 800, [plain_turntable(0)])
    assert main(["sweep", "collect", "s"]) == 0
    assert "5 run(s), 0 of them done:\n  s/results/results.csv\n  s/results/results.html\n" in capsys.readouterr().out
    assert len(rows_of((tmp_path / "s" / "results" / "results.csv").read_text())) == 5
    assert (tmp_path / "s" / "results" / "results.html").read_text().count('<script type="text/plain"') == 1
    assert main(["sweep", "collect", "s", "--out", "out", "--link-media"]) == 0
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["media", "results.csv", "results.html"]
    assert read_sweep(tmp_path / "s").runs == sweep.runs


def test_collect_refuses_what_is_no_sweep_in_one_line(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    assert main(["sweep", "collect", "absent"]) == 2
    assert "absent holds no sweep" in capfd.readouterr().err
    planned(tmp_path / "s", WORDS)
    (tmp_path / "file").write_text("")
    assert main(["sweep", "collect", "s", "--out", "file"]) == 2
    assert "--out 'file' can't be written" in capfd.readouterr().err


# --- In a browser.


@pytest.fixture(scope="module")
def driver():
    pytest.importorskip("selenium", reason="selenium is not installed (pip install selenium)")
    if reason := install_chromium():
        unavailable(reason)
    driver = start_chromium(*WEBGL)
    yield driver
    driver.quit()


class Page:
    """The page in a browser, in the words of who looks at it."""

    def __init__(self, driver, file, width=1280, height=900, **media):
        self.driver = driver
        self.command("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600)
        features = [{"name": name.replace("_", "-"), "value": value} for name, value in media.items()]
        self.command("Emulation.setEmulatedMedia", features=features)
        if driver.current_url.startswith("file:"):  # the page before, which shares its storage with this one
            self.script("localStorage.clear()")
        driver.get_log("browser")
        driver.get(file if isinstance(file, str) else file.as_uri())
        self.until(lambda: self.script("return document.documentElement.dataset.ready"))

    def command(self, name, **values):
        return self.driver.execute_cdp_cmd(name, values)

    def script(self, text, *values):
        return self.driver.execute_script(text, *values)

    def until(self, condition):
        end = time.monotonic() + 10
        while time.monotonic() < end:
            value = condition()
            if value:
                return value
            time.sleep(0.03)
        raise AssertionError("nothing came in 10 seconds")

    def find(self, selector):
        return self.driver.find_element("css selector", selector)

    def click(self, selector):
        self.find(selector).click()

    def keys(self, *keys):
        from selenium.webdriver import ActionChains
        from selenium.webdriver.common.keys import Keys

        for key in keys:
            ActionChains(self.driver).send_keys(getattr(Keys, key, key)).perform()

    def choose(self, selector, text):
        from selenium.webdriver.support.select import Select

        Select(self.find(selector)).select_by_visible_text(text)

    @property
    def count(self):
        return self.find("#count").text

    def shown(self):
        """The runs in the list, all of them, in order."""
        while self.script("return more()"):
            pass
        return [int(run) for run in self.script("return [...document.querySelectorAll('main .open')].map((open) => open.dataset.run)")]

    def focused(self):
        """The run of the card that has the focus."""
        return self.script("return document.activeElement.dataset.run ?? document.activeElement.id")


@pytest.fixture
def page(driver, swept):
    return Page(driver, swept[2] / "inline" / "results.html")


def numbers(results, keep):
    return [number for number, result in enumerate(results) if keep(result)]


def test_every_run_has_a_card_and_no_prompt_becomes_markup(page, swept):
    assert page.count == "80 runs"
    assert page.shown() == list(range(80))
    labels = page.script("return [...document.querySelectorAll('main .open')].map((open) => open.textContent)")
    assert labels == [result.run.prompt for result in swept[1]]
    assert page.driver.title == "s · dist_vsd sweep"
    assert page.script("return [window.owned ?? null, document.images.length]") == [None, 0]
    page.click(f'main .open[data-run="{4 * PROMPTS.index(HOSTILE[0])}"]')
    assert page.find("#detail-prompt").text == HOSTILE[0]
    assert page.driver.get_log("browser") == []


def test_the_page_asks_nobody_for_anything_and_refuses_foreign_scripts(page):
    assert page.script("return performance.getEntriesByType('resource').filter((entry) => !entry.name.startsWith('data:')).length") == 0
    page.script("""
        const script = document.createElement("script"); script.textContent = "window.owned = 1"; document.body.append(script);
        const image = new Image(); image.src = "https://example.org/x.png"; document.body.append(image);
        document.body.insertAdjacentHTML("beforeend", "<button id='bad' onclick='window.owned = 1'>x</button>");
        document.getElementById("bad").click();
    """)
    assert page.script("return window.owned ?? null") is None
    assert sum("Content Security Policy" in line["message"] for line in page.driver.get_log("browser")) >= 3


def test_words_filter_by_prompt_and_tag(page, swept):
    page.keys("/", "green")
    page.until(lambda: page.count == "8 of 80 runs")
    assert page.shown() == numbers(swept[1], lambda result: "green" in result.run.prompt)
    page.keys("ESCAPE")
    assert page.count == "80 runs"
    page.keys("ANIMALS")
    page.until(lambda: page.count == "4 of 80 runs")
    page.keys("ESCAPE", "</script>")
    page.until(lambda: page.count == "8 of 80 runs")
    page.keys("ESCAPE", "nothing of this kind")
    page.until(lambda: page.count == "0 of 80 runs")
    assert page.find("#count").get_attribute("role") == "status"


def test_runs_are_chosen_by_objective_seed_state_and_setting(page, swept):
    page.choose("[data-facet=objective]", "sds")
    page.choose("[data-facet=seed]", "1")
    page.choose("[data-facet=state]", "failed")
    expected = numbers(swept[1], lambda r: (r.settings["objective"], r.run.seed, r.state.state) == ("sds", 1, "failed"))
    assert expected
    assert page.shown() == expected
    page.choose("[data-facet=state]", "all")
    page.choose("[data-facet='score.rank']", "2")
    assert page.count == "0 of 80 runs"  # rank 2 goes with vsd


def test_any_metric_sorts_both_ways_and_runs_without_it_come_last(page, swept):
    figures = [result.figures.get("clip/score") for result in swept[1]]
    have, lack = numbers(swept[1], lambda r: r.figures), numbers(swept[1], lambda r: not r.figures)
    page.choose("#sort", "clip/score")
    assert page.shown() == [*sorted(have, key=lambda i: figures[i]), *lack]
    page.click("#direction")
    assert page.shown() == [*sorted(have, key=lambda i: -figures[i]), *lack]
    page.choose("#sort", "memory/peak_mib")
    assert page.find("main .card .sorted").text == "memory/peak_mib"  # a card shows what it is sorted by


def test_the_same_prompt_stands_side_by_side_across_objectives(page, swept):
    page.click("#as-groups")
    assert page.count == "80 runs of 20 prompts"
    first = "document.querySelector('.group')"
    assert page.script(f"return {first}.querySelector('h2').textContent") == "a green duck"
    assert page.script(f"return [...{first}.querySelectorAll('thead th')].map((head) => head.textContent)") == ["vsd", "sds"]
    numbers_of_row = "[...row.querySelectorAll('.open')].map((open) => +open.dataset.run)"
    rows = page.script(f"return [...{first}.querySelectorAll('tr')].map((row) => {numbers_of_row})")
    runs = [[(swept[1][i].settings["objective"], swept[1][i].run.seed) for i in row] for row in rows if row]
    assert runs == [[("vsd", 0), ("sds", 0)], [("vsd", 1), ("sds", 1)]]
    tops = page.script(f"return [...{first}.querySelectorAll('.card')].map((card) => card.getBoundingClientRect().top)")
    assert tops[0] == tops[1] < tops[2] == tops[3]
    page.choose("#across", "seed")
    assert page.script(f"return [...{first}.querySelectorAll('thead th')].map((head) => head.textContent)") == ["seed 0", "seed 1"]


def test_one_prompt_is_compared_from_its_card(page):
    page.click('main .open[data-run="5"]')
    page.driver.find_element("xpath", "//button[text()='Compare this prompt']").click()
    page.until(lambda: page.count == "4 of 80 runs, of 1 prompt")
    assert page.find("#query").get_attribute("value") == '"a red car"'
    assert not page.find("#detail").is_displayed()


def test_everything_is_reached_by_keys(page):
    page.keys("ARROW_DOWN")
    assert page.focused() == "0"
    page.keys("ARROW_RIGHT", "ARROW_RIGHT")
    assert page.focused() == "2"
    columns = page.script("return getComputedStyle(document.getElementById('cards')).gridTemplateColumns.split(' ').length")
    page.keys("ARROW_DOWN")
    assert page.focused() == str(2 + columns)
    page.keys("ARROW_UP", "ARROW_LEFT")
    assert page.focused() == "1"
    outline = page.script("return getComputedStyle(document.activeElement.closest('.card')).outline")
    assert {"solid", "2px"} <= set(outline.split())
    page.keys("ENTER")
    assert page.find("#detail").is_displayed()
    page.keys("ARROW_RIGHT", "ARROW_RIGHT")
    assert page.find("#detail .steps span").text == "4 of 80"
    page.keys("ESCAPE")
    assert not page.find("#detail").is_displayed()
    page.until(lambda: page.focused() == "3")  # the dialog tells that it was closed a moment later
    page.keys("END")
    assert page.focused() == "79"
    page.keys("c")
    assert page.find("#groups").is_displayed()
    page.keys("c", "/")
    assert page.focused() == "query"
    page.keys("TAB")
    assert page.script("return document.activeElement.dataset.facet") == "objective"


def test_tab_passes_the_controls_in_order_and_stops_once_in_the_list(page):
    page.script("document.activeElement.blur()")
    stops = []
    for _ in range(14):
        page.keys("TAB")
        stops.append(page.script("const e = document.activeElement; return e.id || e.dataset.facet || (e.dataset.run ? 'card' : 'end')"))
    facets = ["objective", "seed", "state", "score.rank"]
    assert stops[:12] == ["turning", "theme", "query", *facets, "sort", "direction", "as-cards", "as-groups", "card"]
    assert "card" not in stops[12:]


def test_every_control_has_a_name_and_every_picture_a_description(page):
    page.click('main .open[data-run="0"]')
    tree = page.command("Accessibility.getFullAXTree")["nodes"]
    roles = ("button", "combobox", "searchbox", "slider", "img", "image", "dialog", "progressbar")
    named = [(node["role"]["value"], node.get("name", {}).get("value", "")) for node in tree if not node.get("ignored")]
    found = [(role, name) for role, name in named if role in roles]
    assert {"button", "slider", "dialog"} <= {role for role, _ in found}
    assert [role for role, name in found if not name.strip()] == []
    assert ("dialog", "a green duck") in found


LUMINANCE = """
const style = getComputedStyle(document.documentElement), probe = document.body.appendChild(document.createElement("i"));
const light = (name) => {
  probe.style.color = style.getPropertyValue(name);
  const linear = (c) => c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4;
  const [r, g, b] = getComputedStyle(probe).color.match(/[0-9.]+/g).map((c) => linear(c / 255));
  return 0.2126 * r + 0.7152 * g + 0.0722 * b;
};
return Object.fromEntries(arguments[0].map((name) => [name, light(name)]));
"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_and_states_contrast_with_their_ground_in_light_and_dark(driver, swept, scheme):
    page = Page(driver, swept[2] / "inline" / "results.html", prefers_color_scheme=scheme)
    assert page.script("return document.documentElement.dataset.theme") == scheme
    grounds, inks = ["--page", "--panel"], ["--text", "--quiet", "--accent", "--done", "--running", "--stopped", "--failed", "--waiting"]
    light = page.script(LUMINANCE, [*grounds, *inks])
    assert (light["--page"] > 0.5) == (scheme == "light")
    for ground in grounds:
        for ink in inks:
            low, high = sorted((light[ground], light[ink]))
            assert (high + 0.05) / (low + 0.05) >= 4.5, (ground, ink)  # WCAG AA


def test_the_theme_follows_the_system_until_it_is_chosen_and_is_remembered(driver, swept):
    file = swept[2] / "inline" / "results.html"
    page = Page(driver, file, prefers_color_scheme="light")
    page.command("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": "dark"}])
    assert page.until(lambda: page.script("return document.documentElement.dataset.theme") == "dark")
    page.click("#theme")
    assert (page.find("#theme").text, page.script("return document.documentElement.dataset.theme")) == ("Theme: light", "light")
    driver.get(file.as_uri())
    assert page.script("return document.documentElement.dataset.theme") == "light"


def test_a_phone_shows_two_cards_abreast_and_scrolls_down_only(driver, swept):
    page = Page(driver, swept[2] / "inline" / "results.html", width=360, height=740)
    tops = page.script("return [...document.querySelectorAll('.card')].slice(0, 3).map((card) => card.getBoundingClientRect().top)")
    assert tops[0] == tops[1] < tops[2]
    for view in ("#as-cards", "#as-groups"):
        page.click(view)
        assert page.script("return document.documentElement.scrollWidth") == 360
    controls = "[...document.querySelectorAll('button:not(.open), select, input')].filter((control) => control.offsetWidth)"
    heights = page.script(f"return {controls}.map((control) => control.offsetHeight)")
    assert min(heights) >= 38
    page.click("#as-cards")
    page.click('main .open[data-run="0"]')
    assert page.script("return document.getElementById('detail').scrollWidth") <= 360


def loaded(page):
    return page.script("return [...document.querySelectorAll('main .loaded')].map((media) => +media.dataset.run)")


DECODE = """
const done = arguments[0], media = document.querySelector("main .loaded");
const image = new Image();
image.src = media.style.getPropertyValue("--strip").slice(5, -2);
image.decode().then(() => done([image.naturalWidth, image.naturalHeight]), (error) => done(String(error)));
"""


def test_pictures_are_decoded_when_they_come_into_view_and_let_go_when_they_leave(page):
    page.until(lambda: loaded(page))
    assert loaded(page)[0] == 0
    assert len(loaded(page)) < 40
    assert page.driver.execute_async_script(DECODE) == [SIZE * NUM_FRAMES, SIZE * 2]
    page.shown()
    page.script("scrollTo(0, document.body.scrollHeight)")
    page.until(lambda: 78 in loaded(page) and 0 not in loaded(page))
    assert len(loaded(page)) < 40
    page.script("scrollTo(0, 0)")
    page.until(lambda: 0 in loaded(page))


def test_pictures_beside_the_page_are_shown_too(driver, swept):
    folder = swept[2] / "linked"
    page = Page(driver, folder / "results.html")
    page.until(lambda: loaded(page))
    assert page.driver.execute_async_script(DECODE) == [SIZE * NUM_FRAMES, SIZE * 2]
    assert page.driver.get_log("browser") == []
    done = [result for result in swept[1] if result.state.state == "done"]
    assert len(list((folder / "media").iterdir())) == len(done)
    assert (folder / "results.html").stat().st_size < 200_000 < (swept[2] / "inline" / "results.html").stat().st_size


def test_objects_turn_together_unless_motion_is_not_wanted(driver, swept):
    file = swept[2] / "inline" / "results.html"
    frames = "return [...document.querySelectorAll('main .loaded')].map((media) => media.style.getPropertyValue('--frame'))"
    page = Page(driver, file)
    page.until(lambda: len(set(page.script(frames))) == 1 and page.script(frames)[0] not in ("", "0"))
    page.click("#turning")
    held = page.script(frames)
    time.sleep(0.4)
    assert page.script(frames) == held
    page = Page(driver, file, prefers_reduced_motion="reduce")
    page.until(lambda: loaded(page))
    time.sleep(0.4)
    assert set(page.script(frames)) == {""}
    assert page.find("#turning").text == "Turn"


# --- Meshes.

CANVAS, MESH = "#detail canvas", "#detail .mesh"


@pytest.fixture(scope="module")
def solids(tmp_path_factory):
    """A folder with a sweep and its page: run 0 with two particles' meshes inside the page, run 1 with a textured one beside it, run 2 with
    none, run 3 with a damaged file beside the page.
    """
    folder = tmp_path_factory.mktemp("solids")
    sweep = planned(folder / "s", WORDS[:4])
    for number, run in enumerate(sweep.runs):
        write_run(sweep.run_dir(run), number, 800, [plain_turntable(number)])
    exports = [sweep.run_dir(run) / "export" for run in sweep.runs]
    write_ball(exports[0] / "mesh_0000.glb")
    write_ball(exports[0] / "mesh_0001.glb", inside_out=True)
    write_ball(exports[1] / "mesh_0000.glb", texture_size=512, num_subdivisions=3)
    (exports[3] / "mesh_0000.glb").write_bytes((exports[0] / "mesh_0000.glb").read_bytes()[:1000])
    results = collect(sweep, {run.id: state_of(run, 0) for run in sweep.runs})
    previews = {result.run.id: preview_of(sweep.run_dir(result.run)) for result in results}
    for name, linked in (("inside", False), ("beside", True)):
        write_page(folder / "s" / name / "results.html", sweep, results, lambda result: previews[result.run.id], link_media=linked)
    return folder


@pytest.fixture(scope="module")
def served(solids):
    """The address of the sweep's folder."""
    handler = functools.partial(QuietHandler, directory=str(solids / "s"))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


class QuietHandler(http.server.SimpleHTTPRequestHandler):
    """Serves a folder without a word."""

    def log_message(self, *_):
        pass


def mesh_page(driver, address, run=0):
    """Open the page and in it the mesh of a run, from its card."""
    page = Page(driver, address, width=700, height=520)
    page.click(f'main .mesh[data-run="{run}"]')
    return page


def canvas(page):
    """What the viewer shows, (H, W, 3) in [0, 1], without its rounded border."""
    shot = Image.open(io.BytesIO(page.find(CANVAS).screenshot_as_png)).convert("RGB")
    return np.asarray(shot)[1:-1, 1:-1] / 255


def ball_seen(like, azimuth_deg=0.0, elevation_deg=15.0, zoom=1.0, sign=1, radius=0.6):
    """Return the ball of synthetic_sweep.py as cameras.py's camera sees it, where every ray meets it, in closed form."""
    distance = 1.05 * radius / math.sin(math.radians(20)) / zoom
    camera = look_at_origin(*(torch.tensor([value]) for value in (azimuth_deg, elevation_deg, distance, 40.0)))
    height, width = like.shape[:2]
    origins, directions = (rays.double().reshape(-1, 3).numpy() for rays in cast_rays(camera, height, width))
    b = (origins * directions).sum(1)
    root = b**2 - (origins**2).sum(1) + radius**2
    hit = origins + (-b - np.sqrt(root.clip(0)))[:, None] * directions
    return np.where(root[:, None] > 0, ball_colors(sign * hit / radius), 1.0).reshape(height, width, 3)


def shows_ball(page, run_and_particle, **seen):
    """Wait until the viewer shows a ball as it is expected: in all colours, and in the area of its round silhouette."""
    page.until(lambda: page.find(CANVAS).get_attribute("data-shows") == run_and_particle)
    page.until(lambda: is_ball(canvas(page), **seen))


def is_ball(found, **seen):
    expected = ball_seen(found, **seen)
    is_found, is_expected = ((picture < 0.97).any(-1) for picture in (found, expected))
    # Pixels on the rim are half of the ball; inside it, 2 degrees make 0.009.
    return abs(is_found.sum() / is_expected.sum() - 1) < 0.01 and np.abs(found - expected)[is_expected].mean() < 0.008


def complaints(page):
    """What the console says, but for Chromium's word on our own screenshots of what is drawn in software."""
    return [line for line in page.driver.get_log("browser") if "GPU stall due to ReadPixels" not in line["message"]]


def drag(page, x, y):
    from selenium.webdriver import ActionChains

    ActionChains(page.driver).move_to_element(page.find(CANVAS)).click_and_hold().move_by_offset(x, y).release().perform()


def test_a_mesh_is_seen_from_the_front_in_its_colours_and_dragging_turns_it(driver, solids):
    page = mesh_page(driver, solids / "s" / "inside" / "results.html")
    shows_ball(page, "0-0")
    assert not is_ball(canvas(page), azimuth_deg=2.0)
    drag(page, 90, 40)
    shows_ball(page, "0-0", azimuth_deg=-45.0, elevation_deg=35.0)
    assert complaints(page) == []
    assert page.script("return performance.getEntriesByType('resource').filter((entry) => !entry.name.startsWith('data:')).length") == 0


def test_the_wheel_zooms_keys_turn_and_a_double_click_begins_anew(driver, solids):
    from selenium.webdriver import ActionChains
    from selenium.webdriver.common.action_chains import ScrollOrigin

    page = mesh_page(driver, solids / "s" / "inside" / "results.html")
    shows_ball(page, "0-0")
    ActionChains(driver).scroll_from_origin(ScrollOrigin.from_element(page.find(CANVAS)), 0, 500).perform()
    shows_ball(page, "0-0", zoom=math.exp(-0.5))
    page.script("arguments[0].focus()", page.find(CANVAS))
    page.keys("ARROW_LEFT", "ARROW_UP")
    shows_ball(page, "0-0", zoom=math.exp(-0.5), azimuth_deg=10.0, elevation_deg=25.0)
    ActionChains(driver).double_click(page.find(CANVAS)).perform()
    shows_ball(page, "0-0")


def test_each_particle_is_chosen_and_the_viewer_stays_open_from_run_to_run(driver, solids):
    page = mesh_page(driver, solids / "s" / "inside" / "results.html")
    page.choose("#detail .solid select", "1")
    shows_ball(page, "0-1", sign=-1)
    page.click('#detail [aria-label="Next run"]')
    shows_ball(page, "1-0")
    page.click('#detail [aria-label="Next run"]')
    assert page.driver.find_elements("css selector", f"{MESH}, {CANVAS}") == []  # it has none
    page.click('#detail [aria-label="Previous run"]')
    page.click(MESH)
    assert page.driver.find_elements("css selector", CANVAS) == []
    assert page.find("#detail .media").is_displayed()


def test_only_runs_with_a_mesh_that_can_be_read_have_a_button(driver, solids):
    page = Page(driver, solids / "s" / "inside" / "results.html")
    buttons = "return [...document.querySelectorAll('main .mesh')].map((button) => +button.dataset.run)"
    assert page.script(buttons) == [0, 1]
    page.click("#as-groups")
    assert page.script(buttons) == [0, 1]


def test_a_mesh_beside_the_page_is_loaded_where_the_page_is_served_with_its_texture(driver, served):
    page = mesh_page(driver, f"{served}/beside/results.html", run=1)
    shows_ball(page, "1-0")
    assert complaints(page) == []
    page.click('#detail [aria-label="Previous run"]')
    shows_ball(page, "0-0")


def test_a_mesh_that_can_t_be_shown_is_told_in_a_line(driver, solids, served):
    page = mesh_page(driver, solids / "s" / "beside" / "results.html")
    page.until(lambda: "run python -m http.server --bind 127.0.0.1 in the sweep's folder" in page.find("#detail .solid .note").text)
    assert not page.find(CANVAS).is_displayed()
    assert complaints(page) == []
    page = mesh_page(driver, f"{served}/beside/results.html", run=3)
    page.until(lambda: "The mesh can't be shown: " in page.find("#detail .solid .note").text)
    page = Page(driver, f"{served}/beside/results.html")
    page.script("HTMLCanvasElement.prototype.getContext = () => null")
    page.click('main .mesh[data-run="0"]')
    page.until(lambda: "this browser has no WebGL 2" in page.find("#detail .solid .note").text)
