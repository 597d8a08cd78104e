"""A whole model in one safetensors file, in the original (LDM) layout as it is published; the file holds no configurations."""

from __future__ import annotations

from pathlib import Path

import torch
from accelerate import init_empty_weights
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.loaders import single_file_utils
from safetensors import safe_open
from torch import nn
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from dist_vsd.priors.pipeline_files import LDM_PREFIXES

CONVERTERS = {
    UNet2DConditionModel: single_file_utils.convert_ldm_unet_checkpoint,
    AutoencoderKL: single_file_utils.convert_ldm_vae_checkpoint,
}


def base_model(shapes: dict[str, tuple[int, ...]], prior: str) -> str:
    """Return the hub id whose configurations suit a file, as diffusers infers it from names and shapes.

    Raises:
        ValueError: the file does not say enough, or is of another kind.
    """
    kind = single_file_utils.infer_diffusers_model_type({name: torch.empty(shape, device="meta") for name, shape in shapes.items()})
    if kind == "v2":
        raise ValueError(
            f"prior {prior!r} is a Stable Diffusion 2.x, and the file does not say whether it predicts eps or v: "
            "name a pipeline folder that does, as in --prior FILE.safetensors+FOLDER"
        )
    if kind not in ("v1", "xl_base"):
        raise ValueError(f"prior {prior!r} is of the kind {kind}: choose a Stable Diffusion 1.x, 2.x or XL base model")
    return single_file_utils.DIFFUSERS_DEFAULT_PIPELINE_PATHS[kind]["pretrained_model_name_or_path"]


def load_from_file(kind: type[nn.Module], file: Path, configs: Path, component: str, dtype: torch.dtype) -> nn.Module:
    """Build a component by its configuration and fill it from its part of the file, by diffusers' conversion.

    Parameters that the file lacks are left on the meta device, without memory.

    Args:
        kind: class of the component.
        file: of the whole model.
        configs: pipeline folder with the configuration.
        component: name of its folder there.
        dtype: of its weights.

    Raises:
        RuntimeError: the file has a tensor in another shape.
    """
    with safe_open(file, "pt") as opened:
        names = [name for name in opened.keys() if name.startswith(LDM_PREFIXES[component])]  # noqa: SIM118 - no iterator
        tensors = {name: opened.get_tensor(name).to(dtype, copy=True) for name in names}  # not a view of a file that may be removed
    if kind not in CONVERTERS:
        assert kind in (CLIPTextModel, CLIPTextModelWithProjection), kind
        return single_file_utils.create_diffusers_clip_model_from_ldm(
            kind, tensors, subfolder=component, config=str(configs), local_files_only=True
        )
    config = kind.load_config(configs / component)
    with init_empty_weights():
        network = kind.from_config(config)
    # Not by from_single_file(), which does not say what a file lacks.
    network.load_state_dict(CONVERTERS[kind](tensors, config=config), strict=False, assign=True)
    return network
