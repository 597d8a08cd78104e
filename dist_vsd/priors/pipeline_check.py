"""Whether a run can use a pipeline, told before anything is loaded or written."""

from __future__ import annotations

from collections.abc import Sequence

from dist_vsd.priors.pipeline_folder import find_pipeline
from dist_vsd.priors.pipeline_kinds import FLOWS
from dist_vsd.priors.prompts import check_prompts


def check_pipeline(prior: str, texts: Sequence[str], prior_of_phi: str = "") -> None:
    """Refuse a pipeline that can't be used, texts that it can't read, or a phi whose own UNet does not fit it.

    Args:
        prior: a name as find_pipeline() takes it.
        texts: that will be embedded.
        prior_of_phi: another such name, or "".

    Raises:
        ValueError: in one line.
    """
    folder = find_pipeline(prior)
    if folder.kind in FLOWS:  # of the hub, whose name alone did not say so: PriorRow.check() goes on
        return
    check_prompts(texts, folder)
    if prior_of_phi:
        from dist_vsd.priors.stable_diffusion import check_unet_fits

        check_unet_fits(find_pipeline(prior_of_phi), folder)
