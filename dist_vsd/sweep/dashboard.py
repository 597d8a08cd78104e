"""The wandb workspace of a sweep, as code: what is worth watching, grouped by prompt and objective.

Needs wandb-workspaces: pip install 'dist_vsd[dashboard]'. Building takes no network, pushing does.
"""

from __future__ import annotations

import importlib.util
import os
import unicodedata
from typing import TYPE_CHECKING

from dist_vsd.errors import RunFailed
from dist_vsd.reporting.wandb_follower import has_key
from dist_vsd.reporting.window import BAND_NAMES

if TYPE_CHECKING:
    from wandb_workspaces.workspaces import Section, Workspace

SECONDS_FOR_A_REQUEST = "20"
NUM_COLUMNS, NUM_ROWS = 3, 2
# Title of a panel and the figures in it, by section. The surrogate's value says nothing, so quality comes first.
CHARTS: dict[str, dict[str, tuple[str, ...]]] = {
    "Quality": {
        "CLIP score": ("clip/score",),
        "CLIP R-precision": ("clip/r_precision",),
        "Diversity between particles": ("particles/diversity",),
        "Entropy of CLIP's predictions, bits: for a view (quality), of their mean (variety)": ("clip/quality_bits", "clip/variety_bits"),
        "Share of particles with more than one face": ("particles/multi_face_rate",),
        "Recognised: object, colour, view": ("recognition/object", "recognition/color", "recognition/view"),
        "Entropy of what is recognised where the prompt leaves it open, bits": ("recognition/color_bits", "recognition/view_bits"),
        "Opacity": ("theta/opacity",),
    },
    "Scores": {
        "||eps_pretrain - eps_phi|| by noise level t / T": BAND_NAMES,
        "phi's denoising loss": ("phi/loss",),
        "Gradient norm of theta": ("theta/gradient_norm",),
        "Norm of w(t) times the difference of the scores": ("theta/score_gradient_norm",),
        "Gradient norm of phi": ("phi/gradient_norm",),
        "Steps skipped as not finite": ("theta/skipped",),
    },
    "System": {
        "Updates per second": ("speed/updates_per_second",),
        "Share of an update in collectives": ("speed/all_reduce_share",),
        "Peak memory of a rank, MiB": ("memory/peak_mib",),
        "Sent by a rank in an update, MiB": ("communication/sent_mib",),
        "Seconds of an update by stage": ("seconds/render", "seconds/scores", "seconds/backward", "seconds/phi"),
    },
}
MEDIA = {"Particles x views": "media/grid", "Turntables": "media/turntable", "Meshes": "media/mesh"}


def build_workspace(sweep_name: str, entity: str, project: str) -> Workspace:
    """Build the workspace of a sweep.

    Args:
        sweep_name: wandb's group of its runs.
        entity: user or team; empty: the key's own, found when it is pushed.
        project: of wandb.

    Raises:
        ValueError: wandb-workspaces is not installed.
    """
    if importlib.util.find_spec("wandb_workspaces") is None:
        raise ValueError("a dashboard needs wandb-workspaces, which is not installed: pip install 'dist_vsd[dashboard]'")
    from wandb_workspaces import workspaces as ws

    return ws.Workspace(
        entity=entity,
        project=project,
        name=_without_symbols(f"dist_vsd sweep {sweep_name}"),
        sections=[_media_section(), *(_chart_section(name) for name in CHARTS)],
        settings=ws.WorkspaceSettings(x_axis="update", max_runs=20, group_by_prefix="first"),
        runset_settings=ws.RunsetSettings(
            filters=f"Metric('Group') == {_literal(sweep_name)}",
            groupby=[ws.Config("prompt"), ws.Config("objective")],
            pinned_columns=["summary:clip/score", "summary:clip/r_precision", "summary:update"],
        ),
    )


def serialize(workspace: Workspace) -> str:
    """Return the JSON that wandb's server would be sent."""
    return workspace._to_model().model_dump_json(by_alias=True, indent=1)


def push(workspace: Workspace) -> str:
    """Save the workspace as a new view of its project.

    Returns:
        Its address.

    Raises:
        ValueError: no key is configured.
        RunFailed: the server can't be reached, or refuses.
    """
    if not has_key(os.environ):
        raise ValueError("pushing a dashboard needs a wandb key, and none is configured: run `wandb login` or set WANDB_API_KEY")
    os.environ.setdefault("WANDB_HTTP_TIMEOUT", SECONDS_FOR_A_REQUEST)
    import wandb

    try:
        if not workspace.entity:
            workspace.entity = wandb.Api().default_entity
        return workspace.save_as_new_view().url
    except Exception as error:  # requests', wandb's own, and those of its GraphQL client
        reason = " ".join(str(error).split())[:200]
        raise RunFailed(f"wandb did not take the dashboard of {workspace.project} ({type(error).__name__}: {reason})") from error


def _literal(text: str) -> str:
    """Write text for a filter, every letter escaped: the library rewrites operators within quotes, and escapes no quotes itself."""
    return "'" + "".join(f"\\U{ord(letter):08x}" for letter in text) + "'"


def _without_symbols(name: str) -> str:
    """Replace what wandb refuses in the name of a workspace: symbols and emoji."""
    return "".join("_" if unicodedata.category(letter)[0] == "S" else letter for letter in name)


def _chart_section(name: str) -> Section:
    from wandb_workspaces.reports.v2 import LinePlot
    from wandb_workspaces.workspaces import Section

    panels = [LinePlot(title=title, x="update", y=list(figures)) for title, figures in CHARTS[name].items()]
    return Section(name=name, panels=panels, is_open=True, layout_settings=_layout())


def _media_section() -> Section:
    from wandb_workspaces.reports.v2 import MediaBrowser
    from wandb_workspaces.workspaces import Section

    panels = [MediaBrowser(title=title, media_keys=[key], num_columns=2) for title, key in MEDIA.items()]
    return Section(name="Particles", panels=panels, is_open=True, layout_settings=_layout())


def _layout() -> object:
    from wandb_workspaces.workspaces import SectionLayoutSettings

    return SectionLayoutSettings(columns=NUM_COLUMNS, rows=NUM_ROWS)
