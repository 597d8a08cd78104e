"""One browser tab: what it has chosen, and what it is shown."""

from __future__ import annotations

import dataclasses
import itertools
import time
from typing import TYPE_CHECKING

import imageio.v3 as iio
import numpy as np

from dist_vsd.cameras import Cameras
from dist_vsd.particles.representations import CHANNELS, Representation
from dist_vsd.training.stages import stages_of
from dist_vsd.viewing.browser_camera import start_position, to_camera
from dist_vsd.viewing.panels import grid_of
from dist_vsd.viewing.shelf import Shelf, Shown

if TYPE_CHECKING:
    from collections.abc import Callable

    import viser

NEWEST = "newest"
ONE, TWO, ALL = "one particle", "two side by side", "all side by side"
RESOLUTIONS = (32, 512, 16)  # least, most and step of the picture's height, pixels


@dataclasses.dataclass(frozen=True)
class View:
    """What a tab wants to see.

    Attributes:
        panels: particle and update of each panel, from left to right; None for the newest update.
        channel: of CHANNELS.
        camera: one, of the browser.
        height: of the whole picture at rest, pixels.
        aspect: its width / height.
    """

    panels: tuple[tuple[int, int | None], ...]
    channel: str
    camera: Cameras
    height: int
    aspect: float


class Session:
    """The controls of one tab, in viser's panel.

    Args:
        client: the tab.
        shelf: the run's checkpoints.
        height: of the picture to begin with, pixels.
        particle: to begin with.
        on_change: called from any thread when something else should be seen.
    """

    def __init__(self, client: viser.ClientHandle, shelf: Shelf, height: int, particle: int, on_change: Callable[[], None]) -> None:
        self._client, self._shelf, self._on_change = client, shelf, on_change
        self._versions = itertools.count()  # next() of it is one step, whichever threads call change()
        self.version, self.changed_at = next(self._versions), 0.0
        self.painted: tuple[int, bool] = (-1, False)  # version, and whether it was the fine picture
        self._picture: np.ndarray | None = None
        self._name = "picture"
        gui, particles, updates = client.gui, [str(i) for i in range(shelf.config.num_particles)], self._updates()
        client.gui.add_markdown(f"**{plain(shelf.config.prompt)}**")
        self._layout = gui.add_dropdown("show", (ONE, TWO, ALL) if len(particles) > 1 else (ONE, TWO))
        self._particle = gui.add_dropdown("particle", particles, initial_value=particles[particle])
        self._update = gui.add_dropdown("checkpoint", updates)
        second = particles[(particle + 1) % len(particles)]
        self._other = gui.add_dropdown("2nd particle", particles, initial_value=second, visible=False)
        self._other_update = gui.add_dropdown("2nd checkpoint", updates, visible=False)
        self._channel = gui.add_dropdown("channel", channels_of(shelf))
        least, most, step = RESOLUTIONS
        self._height = gui.add_slider("pixels high", least, most, step, min(most, max(least, height)))
        self._front = gui.add_button("look from the front")
        self._save = gui.add_button("save the picture")
        self._status, self._message = gui.add_markdown(""), gui.add_markdown("")
        for control in (self._layout, self._particle, self._update, self._other, self._other_update, self._channel, self._height):
            control.on_update(lambda event: self._chosen(by_hand=event.client is not None))
        self._front.on_click(lambda _event: self.look_from_the_front())
        self._save.on_click(lambda _event: self._send_picture())
        client.camera.on_update(lambda _camera: self.change())
        self.change()

    def change(self) -> None:
        """Have the picture made anew."""
        self.changed_at = time.monotonic()
        self.version = next(self._versions)
        self._on_change()

    def refresh(self) -> None:
        """Offer the checkpoints that there are by now; one that was chosen and is gone gives way to the newest."""
        updates = self._updates()
        for control in (self._update, self._other_update):
            if (chosen := control.value) not in updates:
                self.tell(f"{chosen} was removed by the run, which keeps its newest alone; the newest is shown")
            control.options = updates
        self.change()

    def wants(self) -> View:
        """Return what the tab wants to see."""
        first = (int(self._particle.value), _update_of(self._update.value))
        panels = {
            ONE: (first,),
            TWO: (first, (int(self._other.value), _update_of(self._other_update.value))),
            ALL: tuple((particle, first[1]) for particle in range(self._shelf.config.num_particles)),
        }[self._layout.value]
        camera = self._client.camera
        ours = to_camera(camera.position, camera.wxyz, camera.fov)
        return View(panels, self._channel.value, ours, self._height.value, camera.aspect)

    def show(self, picture: np.ndarray, shown: list[Shown], view: View, seconds: float, is_fine: bool) -> None:
        """Put a picture behind the scene and say what it is.

        Args:
            picture: (H, W, 3) uint8; without a loss where it is fine.
            shown: the particle of each panel.
            view: that it was made for.
            seconds: that it took.
            is_fine: whether it has all its pixels.
        """
        self._client.scene.set_background_image(picture, format="png" if is_fine else "jpeg")
        if is_fine:
            self._picture = picture
            which = "-".join(f"{particle:04d}" for particle, _ in view.panels[:4])
            self._name = f"particle_{which}_update_{shown[0].update:08d}_{view.channel}"
        pairs = zip(view.panels, shown, strict=True)
        stages = len(stages_of(self._shelf.config)) > 1
        named = [f"{i}: update {one.update}{f' ({one.stage})' if stages else ''}" for (i, _), one in pairs]
        rows = grid_of(len(named))[0]
        height, width = picture.shape[:2]
        self._status.content = (
            f"particle {'; '.join(named)}{', row by row' if rows > 1 else ''}, of {self._shelf.config.num_updates}  \n"
            f"{width} x {height} pixels in {seconds:.2f} s"
        )

    def tell(self, message: str) -> None:
        """Show one message, or none if it is empty."""
        content = f"⚠ {plain(message)}" if message else ""
        if self._message.content != content:
            self._message.content = content

    def look_from_the_front(self) -> None:
        """Put the camera before the front (+x), as high and as far away as in the middle of training."""
        camera = self._client.camera
        camera.up_direction = (0.0, 0.0, 1.0)
        camera.position, camera.look_at = start_position(self._shelf.config.camera), (0.0, 0.0, 0.0)

    def _chosen(self, by_hand: bool) -> None:
        is_two, is_all = self._layout.value == TWO, self._layout.value == ALL
        self._other.visible = self._other_update.visible = is_two
        self._particle.visible = not is_all
        if by_hand:  # and not by refresh(), which has just said why
            self.tell("")
        self.change()

    def _send_picture(self) -> None:
        if self._picture is not None:
            content = iio.imwrite("<bytes>", self._picture, extension=".png")
            self._client.send_file_download(f"{self._name}.png", content, save_immediately=True)

    def _updates(self) -> list[str]:
        several = len(stages_of(self._shelf.config)) > 1
        names = [f"update {u}" + (f" · {self._shelf.stage_name(u)}" if several else "") for u in reversed(self._shelf.updates)]
        return [NEWEST, *names]


def channels_of(shelf: Shelf) -> list[str]:
    """Return the channels that the particles of a run show in some stage."""
    rows: list[Representation] = [stage.config.representation_row for stage in stages_of(shelf.config)]
    return [channel for channel in CHANNELS if any(channel in row.shows for row in rows)]


def _update_of(choice: str) -> int | None:
    return None if choice == NEWEST else int(choice.split()[1])


def plain(text: str) -> str:
    """Return Markdown that shows a text as it is, whatever stands in it."""
    return "".join(sign if sign.isalnum() or sign == " " else f"&#{ord(sign)};" for sign in text)
