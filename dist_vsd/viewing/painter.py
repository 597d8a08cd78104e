"""The one thread that renders for all tabs: a coarse picture while a camera moves, the fine one once it rests."""

from __future__ import annotations

import threading
import time

import torch

from dist_vsd.errors import is_out_of_memory
from dist_vsd.image_files import to_bytes
from dist_vsd.viewing.panels import lay_out, panel_size, render_panel
from dist_vsd.viewing.session import Session, View
from dist_vsd.viewing.shelf import Shelf, Shown

COARSER = 4  # times fewer pixels a side while something moves
LEAST_HEIGHT = 24  # pixels
REST_SECONDS = 0.25  # without a change, after which the fine picture is made


class Painter:
    """Renders what tabs want to see, one picture after the other, on one CPU core.

    Args:
        shelf: the run's checkpoints.
    """

    def __init__(self, shelf: Shelf) -> None:
        self._shelf = shelf
        self._sessions: dict[int, Session] = {}
        self._wake = threading.Condition()
        self._is_over = False
        self.error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="painter", daemon=True)

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def stop(self) -> None:
        """End once the panel that is being rendered is done."""
        self._is_over = True
        self.wake()
        self._thread.join(timeout=10)

    def add(self, number: int, session: Session) -> None:
        """Paint for a tab from now on."""
        with self._wake:
            self._sessions[number] = session
            self._wake.notify()

    def remove(self, number: int) -> None:
        """Forget a tab that was closed."""
        with self._wake:
            self._sessions.pop(number, None)

    def sessions(self) -> list[Session]:
        """Return the tabs that are open."""
        with self._wake:
            return list(self._sessions.values())

    def wake(self) -> None:
        """Look anew whether there is something to paint."""
        with self._wake:
            self._wake.notify()

    def _run(self) -> None:
        torch.set_num_threads(1)  # of this thread's own pool, too
        try:
            while not self._is_over:
                with self._wake:
                    session, is_fine = self._next()
                    if session is None:
                        self._wake.wait(timeout=REST_SECONDS)
                        continue
                self._paint(session, is_fine)
        except BaseException as error:
            self.error = error

    def _next(self) -> tuple[Session | None, bool]:
        """Return a tab without a picture of what it wants, else one that has rested with a coarse one, and whether it is the latter."""
        for session in self._sessions.values():
            if session.painted[0] != session.version:
                return session, False
        rested = time.monotonic() - REST_SECONDS
        for session in self._sessions.values():
            if not session.painted[1] and session.changed_at < rested:
                return session, True
        return None, False

    def _paint(self, session: Session, is_fine: bool) -> None:
        """Make one picture, unless the tab wants another one meanwhile."""
        version, begin = session.version, time.monotonic()
        try:
            view = session.wants()
            shown, notes = self._take(view)
            height = view.height if is_fine else max(LEAST_HEIGHT, view.height // COARSER)
            panels = []
            for one in shown:
                panels.append(render_panel(one, view.camera, *panel_size(len(shown), height, view.aspect), view.channel))
                if session.version != version and is_fine:
                    return
            session.show(to_bytes(lay_out(panels))[0], shown, view, time.monotonic() - begin, is_fine)
            if notes:
                session.tell("; ".join(notes))
            session.painted = (version, is_fine)
        except ValueError as error:  # a checkpoint that is gone or damaged: the last picture stays
            session.tell(str(error))
            session.painted = (version, True)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            session.tell("out of memory: lower the pixels")
            session.painted = (version, True)

    def _take(self, view: View) -> tuple[list[Shown], list[str]]:
        taken = [self._shelf.take(particle, update) for particle, update in view.panels]
        shown, notes = [one for one, _ in taken], [note for _, told in taken for note in told]
        for one in shown:
            if view.channel not in one.row.shows:
                raise ValueError(f"particles of stage {one.stage} show {', '.join(one.row.shows)} alone: choose another channel")
        return shown, list(dict.fromkeys(notes))
