"""What the loop tells about its updates; reporting/ writes it down, shows it, and passes it on to wandb."""

from __future__ import annotations

from typing import Protocol


class Reporter(Protocol):
    """What the loop tells about its updates.

    Attributes:
        takes_media: whether it makes use of videos and meshes, which take time to make.
    """

    takes_media: bool

    def log(self, update: int, figures: dict[str, float]) -> None:
        """Record the figures after ``update`` updates."""

    def show(self, update: int, media: dict[str, list[str]]) -> None:
        """Record files of the run directory that show the particles after ``update`` updates, by ``media/<name>``."""

    def event(self, update: int, text: str) -> None:
        """Record something that happened."""

    def advance(self, update: int) -> None:
        """Show that ``update`` updates are done."""

    def close(self, exit_code: int = 0) -> None:
        """Finish; the exit code is the run's."""
