"""Finding the CLIP that figures are told by: one that is named, or the one beside a prior. No torch is imported."""

from __future__ import annotations

from pathlib import Path

from dist_vsd.priors.hub import download, is_hub_id
from dist_vsd.priors.pipeline_files import check_tokenizer, read_json, weight_files
from dist_vsd.priors.pipeline_folder import EMBEDDED_FOLDER, EMBEDDED_FOLDERS

EMBEDDED_CLIP_FOLDER = EMBEDDED_FOLDER / "clip"
FILES = (
    "config.json", "preprocessor_config.json", "tokenizer*.json", "vocab.json", "merges.txt", "special_tokens_map.json", "*.safetensors",
)  # fmt: skip


def find_clip(name: str) -> Path:
    """Resolve and check a CLIP's name, as --clip takes it.

    Args:
        name: the folder of a transformers CLIPModel in safetensors, or a hub id (ORGANISATION/NAME[@REVISION]).

    Returns:
        Its folder.

    Raises:
        ValueError: it is neither, or holds no whole CLIPModel; in one line.
    """
    if is_hub_id(name):
        folder = download(name, FILES, "CLIP", "config.json")
    else:
        folder = Path(name).expanduser()
    if not folder.is_dir():
        raise ValueError(f"CLIP {name[:200]!r} is not a folder: give --clip the folder of a CLIPModel, or a hub id (ORGANISATION/NAME)")
    kind = read_json(folder / "config.json", name, "CLIP").get("model_type")
    if kind != "clip":
        raise ValueError(f"CLIP {name!r} is a {kind or 'model of no type'}: give --clip the folder of a CLIPModel")
    moments = read_json(folder / "preprocessor_config.json", name, "CLIP")
    if not all(isinstance(moments.get(key), list) and len(moments[key]) == 3 for key in ("image_mean", "image_std")):
        raise ValueError(f"CLIP {name!r} is damaged: preprocessor_config.json lacks image_mean or image_std; copy it anew")
    check_tokenizer(folder, name, "CLIP")
    if not weight_files(folder, "model", None):
        raise ValueError(f"CLIP {name!r} has no model.safetensors: nothing is unpickled here, convert its weights to safetensors")
    return folder


def clip_beside(prior: str) -> Path | None:
    """Return the folder of the CLIP that lies beside a prior, a folder ``clip`` inside its own, or None.

    Args:
        prior: its name, as --prior takes it.
    """
    folder = EMBEDDED_CLIP_FOLDER if prior in EMBEDDED_FOLDERS else Path(prior.rpartition("+")[2]).expanduser() / "clip"
    return folder if folder.is_dir() else None


def clip_for(prior: str, named: str) -> Path | None:
    """Return the CLIP for a run's figures: the one that is named, else the one beside its prior, else None.

    Raises:
        ValueError: see find_clip.
    """
    return find_clip(named) if named else clip_beside(prior)
