"""Pipelines of the hub, pinned or not, and out of its cache alone where there is no network."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from dist_vsd.priors.known import GATED, instead_of

_HUB_ID = re.compile(r"(?P<id>\w[\w.-]{0,95}/\w[\w.-]{0,95})(@(?P<revision>\w[\w.-]*(/\w[\w.-]*)*))?")


def is_hub_id(prior: str) -> bool:
    """Say whether a prior's name has the form of a hub id, "organisation/name" or "organisation/name@revision", and is no path here."""
    return _HUB_ID.fullmatch(prior) is not None and not Path(prior).exists()


def in_cache(prior: str, file: str) -> Path | None:
    """Return where the hub's cache has a file of a model, if it has it; nothing is asked of the hub."""
    from huggingface_hub import try_to_load_from_cache

    match = _HUB_ID.fullmatch(prior)
    assert match is not None, prior
    cached = try_to_load_from_cache(match["id"], file, revision=match["revision"])
    return Path(cached) if isinstance(cached, str) else None


def download(prior: str, patterns: Sequence[str], kind: str = "prior", first: str = "model_index.json") -> Path:
    """Bring a model's files here, or find them in the hub's cache.

    Args:
        prior: hub id, with "@" and a branch, tag or commit to pin it.
        patterns: of the files.
        kind: what it is, for the message.
        first: a file that it has in any case.

    Returns:
        The folder of that revision in the hub's cache.

    Raises:
        ValueError: it is neither on the hub nor in its cache.
    """
    from huggingface_hub import snapshot_download

    match = _HUB_ID.fullmatch(prior)
    assert match is not None, prior
    name, revision = match["id"], match["revision"]
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=list(patterns), ignore_patterns=["*non_ema*"]))
    except Exception as error:  # the hub's client raises errors of a dozen kinds, its HTTP library's among them
        # A cache that another program filled may lack files that we don't need: what we need is checked by whoever called.
        cached = in_cache(prior, first)
        if cached is not None:
            return cached.parent
        if name in GATED or type(error).__name__ == "GatedRepoError":
            raise ValueError(
                f"{kind} {prior!r} is not in the hub's cache ({type(error).__name__}), and its weights are gated: accept the licence at "
                f"https://huggingface.co/{name}, then `hf auth login`, or give the folder of a copy of yours"
            ) from error
        raise ValueError(
            f"{kind} {prior!r} is neither a folder here nor to be had from the hub ({type(error).__name__}), nor is it in the hub's cache: "
            f"check the name{instead_of(prior)}{', the revision' if revision else ''} or the network"
        ) from error
