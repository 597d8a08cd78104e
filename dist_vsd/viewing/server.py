"""The server of the viewer: viser's page and panel, a painter, and a look at the run's folder now and then."""

from __future__ import annotations

import contextlib
import io
import math
import socket
import time
from collections.abc import Iterator

import viser

from dist_vsd.viewing.browser_camera import start_position
from dist_vsd.viewing.painter import Painter
from dist_vsd.viewing.session import Session
from dist_vsd.viewing.shelf import Shelf

LOOK_EVERY_SECONDS = 0.5


class LocalServer(viser.ViserServer):
    """viser's server, which no page may open to the internet."""

    def request_share_url(self, verbose: bool = True) -> None:
        """Refuse what viser's button would do: pass the page on through a server of others."""
        return


def require_free_port(host: str, port: int) -> None:
    """Refuse an address that can't be listened on.

    Raises:
        ValueError: it is taken, or the host is none of this machine.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
            probe.listen()
    except socket.gaierror as error:
        raise ValueError(f"--host {host!r} is no address ({error.strerror}): use 127.0.0.1, or an address of this machine") from error
    except OSError as error:
        remedy = "choose another --port, or 0 for any that is free" if error.errno in (13, 98) else "use an address of this machine"
        raise ValueError(f"--host {host} --port {port} can't be listened on ({error.strerror}): {remedy}") from error


@contextlib.contextmanager
def serving(shelf: Shelf, host: str, port: int, height: int, particle: int = 0) -> Iterator[tuple[str, Painter]]:
    """Serve the page; yield its address and the painter.

    Args:
        shelf: the run's checkpoints.
        host: to listen on.
        port: to listen on; 0 for any that is free.
        height: of pictures to begin with, pixels.
        particle: to begin with.

    Raises:
        ValueError: the address can't be listened on.
    """
    require_free_port(host, port)
    with contextlib.redirect_stdout(io.StringIO()):  # it prints a table of its addresses, asked or not
        server = LocalServer(host=host, port=port, label="dist-vsd view", verbose=False)
    painter = Painter(shelf)
    server.gui.configure_theme(show_logo=False, show_share_button=False)
    server.gui.main_panel.dock_right()  # beside the picture, not over it
    server.initial_camera.position, server.initial_camera.look_at = start_position(shelf.config.camera), (0.0, 0.0, 0.0)
    server.initial_camera.fov = math.radians(sum(shelf.config.camera.fov_deg) / 2)

    @server.on_client_connect
    def _opened(client: viser.ClientHandle) -> None:
        painter.add(client.client_id, Session(client, shelf, height, particle, painter.wake))

    @server.on_client_disconnect
    def _closed(client: viser.ClientHandle) -> None:
        painter.remove(client.client_id)

    painter.start()
    try:
        shown_host = f"[{host}]" if ":" in host else host
        yield f"http://{shown_host}:{server.get_port()}", painter
    finally:
        painter.stop()
        with contextlib.redirect_stdout(io.StringIO()):
            server.stop()


def watch(shelf: Shelf, painter: Painter, for_seconds: float) -> None:
    """Tell the tabs of new checkpoints until the time is over; 0 means for ever."""
    end = time.monotonic() + for_seconds if for_seconds else math.inf
    while (left := end - time.monotonic()) > 0:
        if painter.error is not None:
            raise painter.error
        if shelf.refresh():
            for session in painter.sessions():
                session.refresh()
        time.sleep(min(LOOK_EVERY_SECONDS, left))
