"""Whether a run can use a rectified flow, told before anything is loaded or written."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from dist_vsd.priors.flow_config import AS_IT_IS, FlowConfig
from dist_vsd.priors.pipeline_folder import find_pipeline
from dist_vsd.priors.pipeline_kinds import FLOWS, PipelineFolder
from dist_vsd.priors.prompts import check_prompts

# What two transformers must share to look at the same x_t and to read the same texts.
SHARED_BY_TRANSFORMERS = ("in_channels", "joint_attention_dim", "caption_channels", "pooled_projection_dim", "guidance_embeds")
SHARED_BY_VAES = ("scaling_factor", "shift_factor")


def check_flow(prior: str, texts: Sequence[str], prior_of_phi: str = "", flow: FlowConfig = AS_IT_IS) -> None:
    """Refuse a flow that can't be used or can't do what is asked, texts that it can't read, or a phi that does not fit it.

    Args:
        prior: a name as find_pipeline() takes it.
        texts: that will be embedded.
        prior_of_phi: another such name, or "".
        flow: what is asked of it beside its own settings.

    Raises:
        ValueError: in one line.
    """
    folder = find_pipeline(prior)
    flow_sizes(folder, flow)
    if not folder.config("transformer").get("guidance_embeds"):
        require_no_guidance_embedding(flow, prior)
    check_prompts(texts, folder)
    if prior_of_phi:
        check_flow_fits(find_pipeline(prior_of_phi), folder)


def flow_sizes(folder: PipelineFolder, flow: FlowConfig) -> tuple[int, int]:
    """Return the height and width of the pictures that a flow is shown, pixels, and how many tokens its transformer sees of one.

    Raises:
        ValueError: pictures of this size don't come out even in tokens, or have more than the transformer has places for.
    """
    transformer, vae, kind = folder.config("transformer"), folder.config("vae"), FLOWS[folder.kind]
    shrinks = 2 ** (len(vae.get("block_out_channels") or vae.get("encoder_block_out_channels") or [0]) - 1)
    patch = kind.packing if kind.packing > 1 else transformer.get("patch_size", 1)
    own = kind.image_size or transformer.get("sample_size", 0) * shrinks
    size, pixels = flow.image_size or folder.facts.get("image_size", own), shrinks * patch
    require_tokens(size, pixels, transformer)
    return size, (size // pixels) ** 2


def require_tokens(size: int, pixels: int, transformer: Mapping[str, Any]) -> None:
    """Refuse a size of pictures.

    Args:
        size: height and width, pixels.
        pixels: of them in a token's side.
        transformer: its configuration; Stable Diffusion 3's has pos_embed_max_size places on a side.
    """
    most = transformer.get("pos_embed_max_size", 0) * pixels
    if not isinstance(size, int) or size % pixels:
        raise ValueError(f"pictures of {size} pixels don't come out even in tokens of {pixels}: use a multiple of it (--flow.image-size)")
    if most and size > most:
        raise ValueError(f"pictures of {size} pixels are larger than the {most} that the transformer knows: lower --flow.image-size")


def require_no_guidance_embedding(flow: FlowConfig, prior: str) -> None:
    """Refuse a guidance embedding for a transformer that has none."""
    if flow.guidance_embedding is not None:
        raise ValueError(
            f"flow.guidance_embedding {flow.guidance_embedding:g} is for a transformer that was distilled from guidance, that of {prior!r} "
            "was not: drop --flow.guidance-embedding, and use --guidance-scale"
        )


def check_flow_fits(folder: PipelineFolder, teacher: PipelineFolder) -> None:
    """Refuse a transformer of another kind, or of other latents or texts than the teacher's; their shifts may differ.

    Raises:
        ValueError: naming what differs.
    """
    one, other = (_what_flows_share(pipeline) for pipeline in (folder, teacher))
    for name, value in one.items():
        if value != other[name]:
            raise ValueError(
                f"phi's prior {str(folder.path)!r} does not fit the teacher: its {name} is {value}, the teacher's {other[name]}; "
                "choose one that shares it"
            )


def _what_flows_share(folder: PipelineFolder) -> dict[str, object]:
    if folder.kind not in FLOWS:
        return {"kind": folder.kind}
    transformer, vae = folder.config("transformer"), folder.config("vae")
    shared = {"kind": folder.kind} | {name: transformer.get(name) for name in SHARED_BY_TRANSFORMERS}
    return shared | {name: vae.get(name) for name in SHARED_BY_VAES}
