"""Finding and checking a StableDiffusionPipeline folder before anything is built from it.

Everything that can be wrong with a prior is told here, in one line, before a run directory is made.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import re
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

EMBEDDED_NAME = "embedded"
EMBEDDED_FOLDER = Path(__file__).parent / "embedded" / "weights"
PIPELINE_CLASS = "StableDiffusionPipeline"
# Components with weights, and the stem of their weight files.
WEIGHTED = {"unet": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model", "text_encoder": "model"}
FACTS_FILE = "dist_vsd.json"
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


@dataclasses.dataclass(frozen=True)
class PipelineFolder:
    """A checked pipeline folder.

    Attributes:
        path: of the folder.
        variants: for each weighted component, the variant of its files ("fp16") or None.
        facts: of FACTS_FILE, which only the embedded prior has: its vocabulary and the cameras it was trained on.
    """

    path: Path
    variants: dict[str, str | None]
    facts: dict[str, Any]


def find_pipeline(prior: str) -> PipelineFolder:
    """Resolve and check a prior's name.

    Args:
        prior: "embedded", the path of a folder, or a hub id ("organisation/name").

    Raises:
        ValueError: it is missing, incomplete, damaged or of another kind.
    """
    try:
        path = EMBEDDED_FOLDER if prior == EMBEDDED_NAME else Path(prior).expanduser()
        is_folder = path.is_dir()
    except (OSError, RuntimeError) as error:  # a name too long for the file system, or an unknown ~user
        raise ValueError(f"prior {prior[:80]!r} is not a folder ({getattr(error, 'strerror', error)}): check the name") from error
    if not is_folder:
        path = _download(prior)
    index = _read_json(path / "model_index.json", prior)
    kind = index.get("_class_name")
    if kind != PIPELINE_CLASS:
        raise ValueError(f"prior {prior!r} is a {kind}, not a {PIPELINE_CLASS}: choose a Stable Diffusion 1.x or 2.x folder")
    for component in (*WEIGHTED, "tokenizer", "scheduler"):
        if not (path / component).is_dir():
            raise ValueError(f"prior {prior!r} is incomplete: {path / component} is missing; copy the whole pipeline folder")
    _read_json(path / "scheduler" / "scheduler_config.json", prior)
    _check_tokenizer(path / "tokenizer", prior)
    variants = {}
    for component, stem in WEIGHTED.items():
        _read_json(path / component / "config.json", prior)
        variants[component] = _check_weights(path / component, stem, prior)
    facts = _read_json(path / FACTS_FILE, prior) if (path / FACTS_FILE).exists() else {}
    return PipelineFolder(path, variants, facts)


def check_vocabulary(prompts: list[str], folder: PipelineFolder) -> None:
    """Refuse words that a prior with a closed vocabulary does not know.

    Raises:
        ValueError: naming the unknown words, the nearest known ones and all that are known.
    """
    known = folder.facts.get("vocabulary")
    if known is None:
        return
    words = re.findall(r"[^\s,.]+", " ".join(prompts).lower())
    unknown = [word for word in dict.fromkeys(words) if word not in known]
    if unknown:
        near = [match for word in unknown for match in difflib.get_close_matches(word, known, n=1)]
        hint = f" (did you mean {', '.join(near)}?)" if near else ""
        raise ValueError(f"the embedded prior does not know {', '.join(map(repr, unknown))}{hint}: it knows the words {' '.join(known)}")


def _download(prior: str) -> Path:
    if not _HUB_ID.fullmatch(prior) or prior.startswith("."):
        raise ValueError(f"prior {prior!r} is not a folder: give 'embedded', the path of a pipeline folder, or a hub id")
    from huggingface_hub import snapshot_download

    patterns = ["model_index.json", "*/*.json", "*/*.safetensors", "*/*.txt"]
    try:
        return Path(snapshot_download(prior, allow_patterns=patterns))
    except Exception as error:  # the hub's client raises errors of a dozen kinds, requests' among them
        raise ValueError(
            f"prior {prior!r} is neither a folder here nor to be had from the hub ({type(error).__name__}): check the name or the network"
        ) from error


def _read_json(file: Path, prior: str) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text())
    except FileNotFoundError as error:
        raise ValueError(f"prior {prior!r} is incomplete: {file} is missing; copy the whole pipeline folder") from error
    except (OSError, ValueError) as error:
        raise ValueError(f"prior {prior!r} is damaged: {file} is not readable JSON; copy it anew") from error
    if not isinstance(content, dict):
        raise ValueError(f"prior {prior!r} is damaged: {file} holds no JSON object; copy it anew")
    return content


def _check_tokenizer(folder: Path, prior: str) -> None:
    if (folder / "tokenizer.json").exists():
        _read_json(folder / "tokenizer.json", prior)
        return
    _read_json(folder / "vocab.json", prior)
    if not (folder / "merges.txt").is_file():
        raise ValueError(f"prior {prior!r} is incomplete: {folder / 'merges.txt'} is missing; copy the whole pipeline folder")


def _check_weights(folder: Path, stem: str, prior: str) -> str | None:
    """Open every safetensors header of a component; return the variant of its files."""
    for variant in (None, "fp16"):
        middle = f".{variant}" if variant else ""
        files = sorted({*folder.glob(f"{stem}{middle}.safetensors"), *folder.glob(f"{stem}{middle}-*-of-*.safetensors")})
        if not files:
            continue
        for file in files:
            try:
                with safe_open(file, "pt"):
                    pass
            except (SafetensorError, OSError) as error:
                raise ValueError(f"prior {prior!r} is damaged: {file} can't be read ({error}); copy it anew") from error
        return variant
    if any(folder.glob("*.bin")):
        raise ValueError(f"prior {prior!r} has only pickled weights in {folder}: nothing is unpickled here, convert them to safetensors")
    raise ValueError(f"prior {prior!r} is incomplete: no {stem}.safetensors in {folder}; copy the whole pipeline folder")
