"""`dist-vsd view`: cameras and cuts in closed form, checkpoints that come, go and are damaged, and the page in a real browser."""

import dataclasses
import html
import io
import re
import shutil
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import psutil
import pytest
import torch
from PIL import Image
from scipy.spatial.transform import Rotation

from dist_vsd.cameras import cast_rays, look_at_origin, turntable
from dist_vsd.cli import main
from dist_vsd.config_files import load_preset, merge
from dist_vsd.distributed.layout import Layout
from dist_vsd.particles.channels import picture_of
from dist_vsd.runs.checkpoint import save
from dist_vsd.runs.run_directory import RunDirectory
from dist_vsd.runs.saved_run import open_run
from dist_vsd.training.state import build_state
from dist_vsd.viewing.browser_camera import ELEVATION_DEG, even_size, square_around, to_camera
from dist_vsd.viewing.panels import grid_of, lay_out, panel_size, render_panel
from dist_vsd.viewing.session import plain
from dist_vsd.viewing.shelf import Shelf
from tests.browser import WEBGL, install_chromium, start_chromium
from tests.runs import environment, unavailable
from tests.warm_python import python

SETTINGS = {"prompt": "a red car", "num_particles": 2, "num_updates": 12, "objective": "sds", "keep_checkpoints": 9}
FIELD = {"field": {"num_samples": 32, "dense_grid": {"resolutions": [8]}, "density_radius": 0.8}}
HEIGHT = 96


def write_run(path, updates, settings=None):
    """Make a run whose particles are random blobs, other ones in each checkpoint; leave its folder locked, as a run that trains does."""
    config = merge(load_preset("embedded"), SETTINGS | FIELD | (settings or {}), "test")
    state = build_state(config, Layout.of(2), torch.device("cpu"))
    directory = RunDirectory(path)
    directory.claim(config)
    directory.checkpoints.mkdir()
    for update in updates:
        generator = torch.Generator().manual_seed(update)
        for particle in state.particles:
            for value in particle.theta.parameters():
                if value.ndim > 2:  # the grids
                    value.data = torch.randn(value.shape, generator=generator) * 8
        save(state, directory.checkpoints, update)
    return directory


def contents(path):
    return {file: (file.stat().st_mtime_ns, file.stat().st_size) for file in sorted(path.rglob("*"))}


def folder_of(path, update):
    return path / "checkpoints" / f"update_{update:08d}"


def cameras(count=7):
    draw = torch.Generator().manual_seed(3)
    azimuth, elevation = 360 * torch.rand(count, generator=draw) - 180, 160 * torch.rand(count, generator=draw) - 80
    return look_at_origin(azimuth, elevation, 2 + torch.rand(count, generator=draw), 30 + 30 * torch.rand(count, generator=draw))


def test_a_browser_s_camera_is_ours_with_y_and_z_turned_round():
    ours = cameras()
    for place in range(len(ours)):
        one = ours[place : place + 1]
        rotation = one.c2w[0, :3, :3].double().numpy() @ np.diag([1.0, -1.0, -1.0])  # OpenCV: y down, looking along z
        x, y, z, w = Rotation.from_matrix(rotation).as_quat()
        found = to_camera(one.c2w[0, :3, 3].tolist(), (3 * w, 3 * x, 3 * y, 3 * z), float(one.fov))
        for ours_now, expected in zip(found.tensors(), one.tensors(), strict=True):
            torch.testing.assert_close(ours_now, expected, rtol=1e-5, atol=1e-5)  # fp32


@pytest.mark.parametrize(("height", "width"), [(6, 6), (6, 10), (10, 4)])
def test_the_middle_of_the_square_render_is_that_of_the_picture_whose_shorter_side_has_the_camera_s_field_of_view(height, width):
    one = cameras()[:1]
    shorter = 2 * torch.atan(torch.tan(one.fov / 2) * height / min(height, width))  # what the formula of rays wants is the vertical one
    one_shown = dataclasses.replace(one, fov=shorter)
    square, size = square_around(one, height, width)
    top, left = (size - height) // 2, (size - width) // 2
    rays = cast_rays(square, size, size)[1].view(size, size, 3)[top : top + height, left : left + width]
    torch.testing.assert_close(rays, cast_rays(one_shown, height, width)[1].view(height, width, 3), rtol=0, atol=1e-5)  # fp32


def test_sizes_are_even_and_rows_hold_at_most_eight():
    assert even_size(97.0, 1.5) == (96, 146)
    assert even_size(0.3, 0.1) == (2, 2)
    assert [grid_of(count) for count in (1, 2, 8, 9, 17)] == [(1, 1), (1, 2), (1, 8), (2, 5), (3, 6)]
    assert panel_size(2, 96, 2.0) == (96, 96)
    panels = [torch.full((3, 2, 4), i / 10) for i in range(9)]
    picture = lay_out(panels)
    assert picture.shape == (1, 3, 4, 20)
    assert picture[0, 0, ::2, ::4].tolist() == [pytest.approx([0, 0.1, 0.2, 0.3, 0.4]), pytest.approx([0.5, 0.6, 0.7, 0.8, 1.0])]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A run with checkpoints after 4 and 8 updates, which tests leave as it is."""
    path = tmp_path_factory.mktemp("view") / "run"
    write_run(path, (4, 8))
    return path


@pytest.fixture
def copied(saved, tmp_path):
    shutil.copytree(saved, tmp_path / "run")
    return tmp_path / "run"


def test_a_shelf_gives_each_checkpoint_and_by_default_the_newest(saved):
    before, shelf = contents(saved), Shelf(saved)
    newest, notes = shelf.take(1, None)
    old, _ = shelf.take(1, 4)
    assert (newest.update, old.update, shelf.updates, notes) == (8, 4, [4, 8], [])
    for shown, update in ((newest, None), (old, 4)):
        expected = open_run(saved, (1,), update=update).particles[1].state_dict()
        assert all(torch.equal(value, expected[name]) for name, value in shown.theta.state_dict().items())
    assert not torch.equal(newest.theta.encoding.levels[0], old.theta.encoding.levels[0])
    assert shelf.take(1, 4)[0] is old  # it is read once
    assert contents(saved) == before


def test_a_damaged_checkpoint_gives_way_to_the_one_before_and_is_named(copied):
    file = folder_of(copied, 8) / "particles" / "0001.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    shown, notes = Shelf(copied).take(1, None)
    assert shown.update == 4
    assert re.search("update_00000008 can't be shown .*0001.safetensors is damaged", notes[0])
    assert Shelf(copied).take(0, None)[0].update == 8  # the other particle is whole
    with pytest.raises(ValueError, match="0001.safetensors is damaged"):
        open_run(copied, (1,), update=8)


def test_a_checkpoint_that_was_removed_is_told_and_a_new_one_is_seen(copied):
    shelf = Shelf(copied)
    shutil.rmtree(folder_of(copied, 4))
    with pytest.raises(ValueError, match="update_00000004 can't be shown .*manifest.json is missing"):
        shelf.take(0, 4)
    assert shelf.refresh()
    assert not shelf.refresh()
    folder_of(copied, 8).rename(folder_of(copied, 8).with_name("away"))
    assert shelf.refresh()
    with pytest.raises(ValueError, match="no checkpoint that can be shown .none was saved yet"):
        shelf.take(0, None)
    folder_of(copied, 8).with_name("away").rename(folder_of(copied, 8))
    assert shelf.refresh()
    assert shelf.take(0, None)[0].update == 8


def test_a_flat_particle_stands_whole_in_the_middle_on_white(tmp_path):
    write_run(tmp_path / "run", (4,), {"representation": "image", "image": {"resolution": 8}})
    shown, _ = Shelf(tmp_path / "run").take(0, None)
    picture = render_panel(shown, cameras()[:1], 8, 20, "color")
    assert picture.shape == (3, 8, 20)
    assert torch.equal(picture[:, :, [*range(6), *range(14, 20)]], torch.ones(3, 8, 12))
    torch.testing.assert_close(picture[:, :, 6:14], shown.theta.picture(8)[0].detach().clamp(0, 1), rtol=0, atol=1e-6)


def test_a_prompt_is_text_and_no_markdown():
    text = 'a *red* <b>car</b> {1+1} [x](http://y) `z` # & "q" \\ 緑 <script>window.owned=1</script>'
    assert html.unescape(plain(text)) == text
    assert re.fullmatch(r"([\w ]|&#\d+;)*", plain(text))


# --- The command.


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["absent"], "run directory absent does not exist: check the path"),
        (["."], ". holds no run (config.yaml is missing)"),
        (["{run}", "--port", "65536"], "--port must be in [0, 65535], got 65536"),
        (["{run}", "--port", "-1"], "--port must be in [0, 65535], got -1"),
        (["{run}", "--size", "8"], "--size must be in [32, 512], got 8"),
        (["{run}", "--for-seconds", "-1"], "--for-seconds must be 0 or more, got -1.0"),
        (["{run}", "--particle", "2"], "has no particle 2: its ids are 0 to 1"),
        (["{run}", "--host", "no.such.host.invalid"], "--host 'no.such.host.invalid' is no address"),
        (["{run}", "--host", "192.0.2.1"], "--host 192.0.2.1 --port 8080 can't be listened on"),
    ],
)
def test_bad_input_is_told_in_one_line(words, says, saved, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("os.nice", lambda _by: 0)  # of this process
    assert main(["view", *(word.format(run=saved) for word in words)]) == 2
    error = capfd.readouterr().err
    assert says in error
    assert error.count("\n") == 1


def test_a_run_without_a_checkpoint_a_taken_port_and_a_missing_viser_are_told(copied, monkeypatch, capfd):
    monkeypatch.setattr("os.nice", lambda _by: 0)  # of this process
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        assert main(["view", str(copied), "--port", port]) == 2
    assert f"--port {port} can't be listened on (Address already in use): choose another --port" in capfd.readouterr().err
    shutil.rmtree(copied / "checkpoints")
    assert main(["view", str(copied)]) == 2
    assert "no checkpoint that can be shown (none was saved yet): let the run go on" in capfd.readouterr().err
    monkeypatch.setitem(sys.modules, "viser", None)
    assert main(["view", str(copied)]) == 2
    assert capfd.readouterr().err == "dist-vsd: error: view needs viser, which is not installed: pip install 'dist_vsd[view]'\n"


# --- In a browser.


class Viewer:
    """The command and its page, in the words of who looks at it."""

    def __init__(self, driver, run, *words):
        command = [python(), "-m", "dist_vsd", "view", str(run), "--port", "0", "--size", str(HEIGHT), *words]
        self.run, self.driver = run, driver
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        self.process = subprocess.Popen(command, env=environment(), **pipes)
        self.address = re.search(r"is shown at (http://\S+)", self.process.stdout.readline())[1]

    def open(self):
        """Open the page anew: each has choices and a camera of its own."""
        driver = self.driver
        driver.get(self.address)
        driver.get_log("browser")  # what the page before it still said
        self.until(lambda: f"x {HEIGHT} pixels in" in self.status())
        for button in driver.find_elements("css selector", ".mantine-Notification-closeButton"):
            button.click()  # that WebGL is in software
        self.until(lambda: not driver.find_elements("css selector", ".mantine-Notification-closeButton"))
        return self

    def until(self, holds, seconds=60):
        from selenium.common.exceptions import StaleElementReferenceException

        end = time.monotonic() + seconds
        while time.monotonic() < end:
            try:
                if holds():
                    return
            except StaleElementReferenceException:  # the page has put another element there
                pass
            time.sleep(0.1)
        raise AssertionError(f"it does not come to that: {self.text()[-600:]}")

    def text(self):
        return self.driver.find_element("tag name", "body").text

    def status(self):
        found = [element.text for element in self.driver.find_elements("xpath", "//p[contains(., 'pixels in')]")]
        return found[0] if found else ""

    def options(self, label):
        """Open a control, which another choice may yet bring, and return its options, by what they say."""

        def is_opened():
            found = self.driver.find_elements("xpath", f"//label[normalize-space()='{label}']/following::input[1]")
            for control in found[:1]:
                control.click()
            return bool(found)

        self.until(is_opened)
        self.until(lambda: self._listed())
        return self._listed()

    def _listed(self):
        return {option.text: option for option in self.driver.find_elements("css selector", "[role=option]") if option.is_displayed()}

    def choose(self, label, value):
        self.options(label)[value].click()
        self.until(lambda: not self._listed())

    def picture(self):
        """What the scene shows, (3, H, W) in [0, 1]."""
        shot = Image.open(io.BytesIO(self.driver.find_element("tag name", "canvas").screenshot_as_png)).convert("RGB")
        return torch.from_numpy(np.array(shot)).permute(2, 0, 1) / 255

    def comes_to_show(self, *expected):
        """Wait until the scene shows these panels; a screen has more pixels, between which it interpolates."""
        panels = torch.cat(expected, -1)[None]

        def is_there():
            found = self.picture()
            scaled = torch.nn.functional.interpolate(panels, found.shape[1:], mode="bilinear")[0]
            return float((found - scaled).abs().mean()) < 0.01  # other particles and channels are 0.05 away at the least

        self.until(is_there)

    def end(self):
        self.process.send_signal(signal.SIGINT)
        output, _ = self.process.communicate(timeout=120)
        return self.process.returncode, output


@pytest.fixture(scope="module")
def driver():
    pytest.importorskip("selenium", reason="selenium is not installed (pip install selenium)")
    pytest.importorskip("viser", reason="viser is not installed (pip install viser)")
    if reason := install_chromium():
        unavailable(reason)
    driver = start_chromium(*WEBGL, "--window-size=640,400")
    yield driver
    driver.quit()


@pytest.fixture(scope="module")
def shared(driver, saved):
    """A viewer of the run that stays as it is."""
    viewer = Viewer(driver, saved)
    yield viewer
    viewer.process.kill()
    viewer.process.communicate()


@pytest.fixture
def viewer(shared):
    return shared.open()


def seen(viewer, particle, update, channel="color", panels=1):
    """What the browser should show of a particle from its first camera, by a render of our own: in front, and cut out of a square."""
    camera = load_preset("embedded").camera
    fov_deg, distance = sum(camera.fov_deg) / 2, sum(camera.distance) / 2
    viewer.until(lambda: f"x {HEIGHT} pixels in" in viewer.status())  # the fine picture, of this many panels
    width, height = (int(number) for number in re.search(r"(\d+) x (\d+) pixels", viewer.status()).groups())
    width //= panels
    size, shorter = max(width, height), min(width, height)
    wider = 2 * np.degrees(np.arctan(np.tan(np.radians(fov_deg) / 2) * size / shorter))
    square = turntable(1, ELEVATION_DEG, distance, wider)
    with torch.no_grad():
        theta = open_run(viewer.run, (particle,), update=update).particles[particle]
        image = picture_of(theta.render(square, size), channel, square)[0].clamp(0, 1)
    top, left = (size - height) // 2, (size - width) // 2
    return image[:, top : top + height, left : left + width]


def test_the_page_shows_the_particle_as_it_renders_itself_and_each_choice_changes_it(viewer):
    viewer.comes_to_show(seen(viewer, 0, 8))
    for channel in ("normal", "depth", "opacity", "color"):
        viewer.choose("channel", channel)
        viewer.comes_to_show(seen(viewer, 0, 8, channel))
    viewer.choose("particle", "1")
    viewer.comes_to_show(seen(viewer, 1, 8))
    viewer.choose("checkpoint", "update 4")
    viewer.comes_to_show(seen(viewer, 1, 4))
    assert "particle 1: update 4, of 12" in viewer.status()
    assert float((seen(viewer, 1, 4) - seen(viewer, 1, 8)).abs().mean()) > 0.04


def test_particles_and_checkpoints_stand_side_by_side_seen_from_one_camera(viewer):
    viewer.choose("show", "all side by side")
    viewer.until(lambda: "0: update 8; 1: update 8" in viewer.status() and f"x {HEIGHT} pixels" in viewer.status())
    viewer.comes_to_show(*(seen(viewer, particle, 8, panels=2) for particle in (0, 1)))
    viewer.choose("show", "two side by side")
    viewer.choose("2nd particle", "0")
    viewer.choose("2nd checkpoint", "update 4")
    viewer.until(lambda: "0: update 8; 0: update 4" in viewer.status())
    viewer.comes_to_show(*(seen(viewer, 0, update, panels=2) for update in (8, 4)))


def test_the_mouse_turns_it_and_a_button_turns_it_back(viewer):
    from selenium.webdriver import ActionChains

    front = seen(viewer, 0, 8)
    viewer.comes_to_show(front)
    canvas = viewer.driver.find_element("tag name", "canvas")
    ActionChains(viewer.driver).move_to_element(canvas).click_and_hold().move_by_offset(150, 40).release().perform()
    scaled = torch.nn.functional.interpolate(front[None], viewer.picture().shape[1:], mode="bilinear")[0]
    viewer.until(lambda: float((viewer.picture() - scaled).abs().mean()) > 0.03)
    viewer.driver.find_element("xpath", "//button[contains(., 'look from the front')]").click()
    viewer.comes_to_show(front)


def test_checkpoints_that_come_go_and_are_damaged_while_it_is_open(driver, copied):
    viewer = Viewer(driver, copied).open()
    viewer.comes_to_show(seen(viewer, 0, 8))
    whole = folder_of(viewer.run, 4)
    later = folder_of(viewer.run, 12)
    shutil.copytree(whole, later.with_name(".partial_00000012"))
    manifest = later.with_name(".partial_00000012") / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"update": 4', '"update": 12'))
    later.with_name(".partial_00000012").rename(later)
    viewer.until(lambda: "particle 0: update 12" in viewer.status())
    viewer.comes_to_show(seen(viewer, 0, 12))
    viewer.choose("checkpoint", "update 8")
    viewer.until(lambda: "particle 0: update 8" in viewer.status())
    shutil.rmtree(folder_of(viewer.run, 8))
    viewer.until(lambda: "update 8 was removed by the run" in viewer.text() and "particle 0: update 12" in viewer.status())
    file = later / "particles" / "0001.safetensors"
    file.write_bytes(b"nothing")
    viewer.choose("particle", "1")
    viewer.until(lambda: "0001.safetensors is damaged" in viewer.text() and "particle 1: update 4" in viewer.status())
    viewer.choose("checkpoint", "update 12")
    viewer.choose("particle", "0")
    viewer.until(lambda: "particle 0: update 12" in viewer.status() and "damaged" not in viewer.text())
    assert viewer.end() == (0, "ended\n")  # Ctrl+C


def test_it_listens_on_this_machine_alone_writes_nothing_and_goes_last(viewer):
    before = contents(viewer.run)
    viewer.comes_to_show(seen(viewer, 0, 8))
    port = int(viewer.address.rpartition(":")[2])
    listening = [found for found in psutil.net_connections("tcp") if found.status == psutil.CONN_LISTEN]
    (process,) = (psutil.Process(found.pid) for found in listening if found.laddr.port == port)
    assert [found.laddr.ip for found in listening if found.pid == process.pid] == ["127.0.0.1"]
    assert process.nice() >= 19
    assert contents(viewer.run) == before
    assert [entry for entry in viewer.driver.get_log("browser") if entry["level"] == "SEVERE"] == []


def test_it_can_end_by_itself(saved):
    command = [python(), "-m", "dist_vsd", "view", str(saved), "--port", "0", "--for-seconds", "0.2"]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")
    assert re.fullmatch(r".*run is shown at http://127\.0\.0\.1:\d+ \(Ctrl\+C ends it\)\n", done.stdout)
