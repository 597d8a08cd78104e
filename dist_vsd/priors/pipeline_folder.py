"""Finding a pipeline and checking it before anything is built from it; what is checked of a flow is in flow_folder.py.

Everything that can be wrong with a prior is told here, in one line, before a run directory is made.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import re
from pathlib import Path
from typing import Any

from dist_vsd.priors.flow_folder import check_flow_folder
from dist_vsd.priors.hub import download, in_cache, is_hub_id
from dist_vsd.priors.known import KNOWN_FLOWS, instead_of, require_named
from dist_vsd.priors.mvdream_files import CAMERA_TENSOR, FIRST_TENSOR, MVDREAM_PIPELINES, MVDREAM_UNET, unet_settings
from dist_vsd.priors.pipeline_files import check_tokenizer, find_variant, read_json, read_shapes
from dist_vsd.priors.pipeline_kinds import (
    FACTS_FILE,
    FLOWS,
    MVDREAM,
    STABLE_DIFFUSION,
    STABLE_DIFFUSION_XL,
    TOKENIZERS,
    VIEWS_TOGETHER,
    WEIGHTED,
    PipelineFolder,
    part_of,
    text_encoders,
)

EMBEDDED_NAME, MULTI_VIEW_NAME, FLOW_NAME = "embedded", "embedded-multiview", "embedded-flow"
EMBEDDED_FOLDER = Path(__file__).parent / "embedded" / "weights"
# The priors that ship, all of the same world and of the same CLIP.
EMBEDDED_FOLDERS = {
    EMBEDDED_NAME: EMBEDDED_FOLDER,
    MULTI_VIEW_NAME: EMBEDDED_FOLDER.with_name("multi_view_weights"),
    FLOW_NAME: EMBEDDED_FOLDER.with_name("flow_weights"),
}
COMPONENT_CLASSES = {
    "unet": "UNet2DConditionModel", "vae": "AutoencoderKL",
    "text_encoder": "CLIPTextModel", "text_encoder_2": "CLIPTextModelWithProjection",
}  # fmt: skip
# One tensor of each, by whose shape weights of something else are told; its name in the original layout ends alike, but the unet's.
FIRST_TENSORS = {"unet": "conv_in.weight", "vae": "encoder.conv_in.weight"}
FIRST_TENSORS |= dict.fromkeys(("text_encoder", "text_encoder_2"), "token_embedding.weight")
LDM_FIRST_OF_UNET = "model.diffusion_model.input_blocks.0.0.weight"
POSE_WIDTH = 16  # a flattened camera-to-world matrix
SDXL_LATENT_SCALE = 8  # pixels of a latent's side, in every SDXL
HOW_TO_NAME = (
    "give 'embedded', 'embedded-multiview', 'embedded-flow', a pipeline folder, FILE.safetensors or FILE.safetensors+FOLDER, or a hub id "
    "(ORGANISATION/NAME[@REVISION])"
)
_SINGLE_FILE = re.compile(r"(?P<file>.*\.safetensors)(\+(?P<configs>.+))?", re.IGNORECASE)


def find_pipeline(prior: str) -> PipelineFolder:
    """Resolve and check a prior's name.

    A single file holds neither configurations nor tokenizers: they are those of the folder (or hub id) after "+", else those of
    the base model that its tensors tell, from the hub or its cache.

    Args:
        prior: a name of EMBEDDED_FOLDERS, the path of a folder, FILE.safetensors, FILE.safetensors+FOLDER, or a hub id
            ("organisation/name", or "organisation/name@revision" to pin a branch, tag or commit).

    Raises:
        ValueError: it is missing, incomplete, damaged or of another kind.
    """
    if prior in EMBEDDED_FOLDERS:
        return _check_folder(EMBEDDED_FOLDERS[prior], prior)
    require_named(prior)
    single = _SINGLE_FILE.fullmatch(prior)
    try:
        path = Path(prior).expanduser()
        if path.is_dir():
            return _check_folder(path, prior)
        if single and (file := Path(single["file"]).expanduser()).is_file():
            return _check_single_file(file, single["configs"], prior)
        is_file = path.is_file()
    except (OSError, RuntimeError) as error:  # a name too long for the file system, or an unknown ~user
        raise ValueError(f"prior {prior[:80]!r} is not a folder ({getattr(error, 'strerror', error)}): check the name") from error
    if is_file and path.suffix.lower() in (".ckpt", ".bin", ".pt", ".pth"):
        raise ValueError(f"prior {prior!r} is pickled: nothing is unpickled here, convert it to safetensors")
    if is_file or single or not is_hub_id(prior):
        where = "" if is_file else " here, nor a file"
        raise ValueError(f"prior {prior!r} is not a folder{where}{instead_of(prior)}: {HOW_TO_NAME}")
    return _check_folder(_download(prior, with_weights=True), prior)


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


def _download(prior: str, with_weights: bool) -> Path:
    folders = [*WEIGHTED, *TOKENIZERS, "scheduler"]
    endings = ["json", "txt", "safetensors"] if with_weights else ["json", "txt"]
    return download(prior, ["model_index.json", *(f"{folder}/*.{ending}" for folder in folders for ending in endings)])


def _check_folder(path: Path, prior: str) -> PipelineFolder:
    """Check a folder with its weights."""
    if read_json(path / "model_index.json", prior).get("_class_name") in FLOWS:
        return check_flow_folder(path, prior)
    folder = _check_configs(path, prior)
    variants = {component: find_variant(path / component, WEIGHTED[component], prior) for component in folder.variants}
    facts = read_json(path / FACTS_FILE, prior) if (path / FACTS_FILE).exists() else {}
    folder = dataclasses.replace(folder, variants=variants, facts=facts)
    shapes = {component: read_shapes(folder.files(component), prior) for component in variants}
    for component in variants:
        _check_shapes(shapes[component], component, path, prior)
    _check_views(folder, shapes["unet"], prior)
    return folder


def _check_views(folder: PipelineFolder, shapes: dict[str, tuple[int, ...]], prior: str) -> None:
    """Refuse a multi-view prior whose UNet takes no cameras, or one that takes them and does not say how many views belong together."""
    views, config = folder.views_per_shot, folder.unet_settings
    takes_cameras = config.get("class_embed_type") == "projection"
    if views not in (1, VIEWS_TOGETHER):
        raise ValueError(f"prior {prior!r} scores {views!r} views together ({FACTS_FILE}): {VIEWS_TOGETHER} can be used, or 1")
    if takes_cameras != (views > 1):
        told = "takes cameras" if takes_cameras else "takes no cameras (class_embed_type)"
        raise ValueError(f"prior {prior!r} is damaged: its unet {told}, {FACTS_FILE} has views_per_shot {views}; copy it anew")
    name = CAMERA_TENSOR if folder.kind == MVDREAM else "class_embedding.linear_1.weight"
    found, width = shapes.get(name, (0, 0))[1:], config.get("projection_class_embeddings_input_dim")
    if takes_cameras and found != (POSE_WIDTH,):
        raise ValueError(
            f"prior {prior!r} is damaged: its unet's camera ({name}) takes {found[0]} numbers, its configuration "
            f"says {width}, a pose has {POSE_WIDTH}; copy it anew"
        )


def is_multi_view(prior: str) -> bool:
    """Say whether a name means a prior that scores several views together, by two small files; whether it is whole is asked later."""
    if prior in EMBEDDED_FOLDERS:
        return prior == MULTI_VIEW_NAME
    found: dict[str, Any] = {}
    for file in (FACTS_FILE, "model_index.json"):
        with contextlib.suppress(ValueError, OSError, RuntimeError):  # no folder, or none of this program's
            found |= read_json(Path(prior).expanduser() / file, prior)
    return found.get("views_per_shot", 1) != 1 or found.get("_class_name") in MVDREAM_PIPELINES


def is_flow(prior: str) -> bool:
    """Say whether a name means a rectified flow, by its model_index.json, here or in the hub's cache, or by a name that is known."""
    if prior in EMBEDDED_FOLDERS:
        file: Path | None = EMBEDDED_FOLDERS[prior] / "model_index.json"
    elif not is_hub_id(prior):
        file = Path(prior) / "model_index.json"
    elif prior.partition("@")[0] in KNOWN_FLOWS.values():
        return True
    else:
        file = in_cache(prior, "model_index.json")
    with contextlib.suppress(ValueError, OSError, RuntimeError):  # no folder, or none of a pipeline
        return file is not None and read_json(file.expanduser(), prior).get("_class_name") in FLOWS
    return False


def _check_single_file(file: Path, configs: str | None, prior: str) -> PipelineFolder:
    """Check a single file with the folder of its configurations."""
    shapes = read_shapes([file], prior)
    if not all(part_of(shapes, component) for component in ("unet", "vae", "text_encoder")):
        raise ValueError(
            f"prior {prior!r} is not a whole model in the original layout (model.diffusion_model, first_stage_model and a text encoder): "
            "give one, or a pipeline folder"
        )
    if configs is None:
        from dist_vsd.priors.single_file import base_model

        base = base_model(shapes, prior)
        try:
            path = _download(base, with_weights=False)
        except ValueError as error:
            raise ValueError(
                f"prior {prior!r} needs the configurations and the tokenizer of {base}, which can't be had from the hub or its cache: "
                "name a folder that has them, as in --prior FILE.safetensors+FOLDER"
            ) from error
    else:
        path = Path(configs).expanduser()
        if not path.is_dir():
            if not is_hub_id(configs):
                raise ValueError(f"prior {prior!r}: {configs!r} is not a folder: name the pipeline folder of its configurations")
            path = _download(configs, with_weights=False)
    folder = dataclasses.replace(_check_configs(path, prior), single_file=file)
    predicts = read_json(path / "scheduler" / "scheduler_config.json", prior).get("prediction_type", "epsilon")
    if "v_pred" in shapes and predicts != "v_prediction":  # a mark that v-predicting XL files carry
        raise ValueError(f"prior {prior!r} says that it predicts v, {path} has prediction_type {predicts!r}: name another folder after +")
    for component in folder.variants:
        _check_shapes(part_of(shapes, component), component, path, prior)
    return folder


def _check_configs(path: Path, prior: str) -> PipelineFolder:
    """Check everything of a pipeline but its weights."""
    index = read_json(path / "model_index.json", prior)
    kind = index.get("_class_name")
    kind = MVDREAM if kind in MVDREAM_PIPELINES else kind
    if kind not in (STABLE_DIFFUSION, STABLE_DIFFUSION_XL, MVDREAM):
        raise ValueError(
            f"prior {prior!r} is a {kind}, not a {STABLE_DIFFUSION} or {STABLE_DIFFUSION_XL}: "
            "choose Stable Diffusion 1.x, 2.x, an XL base model or MVDream, or the folder of Stable Diffusion 3, FLUX or SANA"
        )
    encoders, tokenizers = zip(*text_encoders(kind), strict=True)
    components = ("unet", "vae", *encoders)
    for name in (*components, *tokenizers, "scheduler"):
        if not (path / name).is_dir():
            raise ValueError(f"prior {prior!r} is incomplete: {path / name} is missing; copy the whole pipeline folder")
    for name in components:
        _, found = index.get(name, ("", COMPONENT_CLASSES[name]))
        wanted = MVDREAM_UNET if name == "unet" and kind == MVDREAM else COMPONENT_CLASSES[name]
        if found != wanted:
            raise ValueError(f"prior {prior!r} has a {name} of class {found}, not {wanted}: choose another prior")
    if read_json(path / "scheduler" / "scheduler_config.json", prior).get("beta_schedule") is None:
        raise ValueError(f"prior {prior!r} has no beta_schedule in {path / 'scheduler'}: choose a prior that was trained with one")
    for name in tokenizers:
        check_tokenizer(path / name, prior)
    configs = {name: read_json(path / name / "config.json", prior) for name in components}
    _check_widths(configs | {"unet": unet_settings(configs["unet"], prior)}, kind, prior)
    zeros = kind == STABLE_DIFFUSION_XL and index.get("force_zeros_for_empty_prompt", True)
    return PipelineFolder(path, dict.fromkeys(components), {}, kind, zeros_for_empty_prompt=zeros)


def _check_widths(configs: dict[str, dict[str, Any]], kind: str, prior: str) -> None:
    """Refuse parts that don't belong together, by their configurations."""
    unet, vae = configs["unet"], configs["vae"]
    text_width = sum(configs[name].get("hidden_size", 512) for name, _ in text_encoders(kind))  # transformers leaves defaults out
    wanted, given = unet.get("cross_attention_dim"), (unet.get("in_channels"), vae.get("latent_channels", 4))
    if isinstance(wanted, int) and wanted != text_width:
        raise ValueError(f"prior {prior!r} is of mixed parts: its unet reads texts of width {wanted}, its text encoders write {text_width}")
    if given[0] != given[1]:
        raise ValueError(
            f"prior {prior!r} can't be distilled from: its unet takes {given[0]} channels, its vae gives {given[1]}; inpainting and "
            "image-to-image models take more: choose a text-to-image model"
        )
    if vae.get("latents_mean") is not None or vae.get("shift_factor"):
        raise ValueError(f"prior {prior!r} shifts its latents (latents_mean or shift_factor of its vae): Stable Diffusion has neither")
    side = unet.get("sample_size")
    if not isinstance(side, int):
        raise ValueError(f"prior {prior!r} must have one sample_size in its unet's configuration, got {side!r}: square pictures alone")
    scale = 2 ** (len(vae.get("block_out_channels", [0])) - 1)
    if kind == STABLE_DIFFUSION_XL and scale != SDXL_LATENT_SCALE:
        raise ValueError(f"prior {prior!r} has a vae that shrinks pictures {scale} times, an XL's {SDXL_LATENT_SCALE}: choose another")


def _check_shapes(shapes: dict[str, tuple[int, ...]], component: str, path: Path, prior: str) -> None:
    """Refuse weights of something else, by the shape of one tensor that every layout has."""
    config = read_json(path / component / "config.json", prior)
    config = unet_settings(config, prior) if component == "unet" else config
    if component in ("unet", "vae"):
        expected = (config.get("block_out_channels", [0])[0], config.get("in_channels", 3))
    else:
        expected = (config.get("vocab_size", 49408), config.get("hidden_size", 512))
    first = FIRST_TENSORS[component]
    same = (first, LDM_FIRST_OF_UNET, FIRST_TENSOR)
    names = (name for name in shapes if name in same or (component != "unet" and name.endswith(f".{first}")))
    found = next((shapes[name][:2] for name in names), None)
    if found != expected:
        told = "is not there" if found is None else f"has the shape {found}"
        raise ValueError(
            f"prior {prior!r} is damaged: its {component} has wrong weights ({first} {told}, its configuration says {expected}); "
            "copy it anew"
        )
