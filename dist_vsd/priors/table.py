"""Every kind of prior in one table: which names mean it, what loads it, and what is known of it before anything is loaded.

A new one is its file and a row here. No torch is imported: a command asks this table before it begins.
"""

from __future__ import annotations

import dataclasses
import pkgutil
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from dist_vsd.priors.architecture_names import is_random_flow, is_random_prior
from dist_vsd.priors.attention_names import ATTENTIONS
from dist_vsd.priors.compile_names import COMPILES
from dist_vsd.priors.flow_config import AS_IT_IS, FlowConfig
from dist_vsd.priors.known import SUGGESTED_FLOW, require_named
from dist_vsd.priors.lora_targets import FLOW_TARGETS, require_targets
from dist_vsd.priors.pipeline_folder import VIEWS_TOGETHER, is_flow, is_multi_view
from dist_vsd.priors.samplers import DISCRETE_SAMPLERS, FLOW_SAMPLER

if TYPE_CHECKING:
    import torch

    from dist_vsd.priors.prior import Prior


@dataclasses.dataclass(frozen=True, kw_only=True)
class PriorRow:
    """What the rest of the program knows of a kind of prior.

    Attributes:
        made_by: "module:Class" of it; its ``load(name, device, dtype)`` returns a Prior, and takes ``flow`` if it is one.
        checked_by: "module:function", given a name, the texts that will be embedded, and the name of phi's own prior or "". It raises
            ValueError, in one line, for what can't be used. A flow's is given, fourth, what is asked of the flow.
        means: whether a name, as --prior takes it, is of this kind.
        views_per_shot: V, how many views of a particle it scores together.
        attentions: what can compute its attention, of attention_names.ATTENTIONS; more than sdpa means that it has ``use_attention``.
        compiles: how it can be compiled, of compile_names.COMPILES; more than off means that it has ``use_compile``.
        targets: beside what phi's LoRA may stand on its network, of score_config.TARGETS.
        is_flow: whether it is a rectified flow, whose sampler is euler, and which a configuration's section ``flow`` is for.
    """

    made_by: str
    checked_by: str
    means: Callable[[str], bool]
    views_per_shot: int = 1
    attentions: tuple[str, ...] = ("sdpa",)
    compiles: tuple[str, ...] = ("off",)
    targets: tuple[str, ...] = ("attention", "feedforward", "convolutions", "time")
    is_flow: bool = False

    def load(
        self,
        name: str,
        device: torch.device | str = "cpu",
        dtype: torch.dtype | None = None,
        attention: str = "sdpa",
        compiled: str = "off",
        flow: FlowConfig | None = None,
    ) -> Prior:
        """Load a prior of this kind; ValueError if it can't be used."""
        kind = pkgutil.resolve_name(self.made_by)
        options = {} if dtype is None else {"dtype": dtype}
        if self.is_flow and flow is not None:
            options["flow"] = flow
        prior = kind.load(name, device, **options)
        if attention != "sdpa":
            assert attention in self.attentions, (attention, self.attentions)  # require_attention() is asked before
            prior.use_attention(attention)
        if compiled != "off":
            assert compiled in self.compiles, (compiled, self.compiles)  # require_compile() is asked before
            prior.use_compile(compiled)
        return prior

    def require_targets(self, targets: Sequence[str]) -> None:
        """Refuse layers for LoRA that the network has not; ValueError in one line."""
        require_targets(targets, self.targets)

    def require_sampler(self, sampler: str) -> None:
        """Refuse a sampler of the other kind of process; ValueError in one line."""
        if sampler and (sampler == FLOW_SAMPLER) != self.is_flow:
            kind, known = ("a rectified flow", (FLOW_SAMPLER,)) if self.is_flow else ("no rectified flow", DISCRETE_SAMPLERS)
            raise ValueError(
                f"sampler must be {' or '.join(known)} for this prior, which is {kind}, got {sampler!r}: change it, or leave it out"
            )

    def check(
        self,
        name: str,
        texts: Sequence[str],
        prior_of_phi: str = "",
        flow: FlowConfig = AS_IT_IS,
    ) -> None:
        """Refuse what can't be used, before anything is loaded or written; ValueError in one line."""
        check = pkgutil.resolve_name(self.checked_by)
        if self.is_flow:
            check(name, texts, prior_of_phi, flow)
            return
        asked = [field.name for field in dataclasses.fields(flow) if getattr(flow, field.name) != field.default]
        if asked:
            require_named(name, is_flow=True)
        check(name, texts, prior_of_phi)
        if is_flow(name):  # one of the hub's, found to be a flow when it has come
            prior_row(name).check(name, texts, prior_of_phi, flow)
        elif asked:
            raise ValueError(
                f"flow.{asked[0]} is for a prior that is a rectified flow, {name!r} is none: drop --flow.{asked[0].replace('_', '-')}, or "
                f"give another --prior, such as {SUGGESTED_FLOW}"
            )


# The last row that means a name has it. The first one takes what is left, and refuses what is no name with the names that there are.
PRIORS: dict[str, PriorRow] = {
    "stable_diffusion": PriorRow(
        made_by="dist_vsd.priors.stable_diffusion:StableDiffusionPrior",
        checked_by="dist_vsd.priors.pipeline_check:check_pipeline",
        means=lambda _name: True,
        attentions=ATTENTIONS,
        compiles=COMPILES,
    ),
    "multi_view": PriorRow(
        made_by="dist_vsd.priors.multi_view:MultiViewPrior",
        checked_by="dist_vsd.priors.pipeline_check:check_pipeline",
        means=is_multi_view,
        views_per_shot=VIEWS_TOGETHER,
        attentions=ATTENTIONS,
    ),
    "flow": PriorRow(
        made_by="dist_vsd.priors.flow:FlowPrior",
        checked_by="dist_vsd.priors.flow_check:check_flow",
        means=is_flow,
        targets=FLOW_TARGETS,
        is_flow=True,
    ),
    "random": PriorRow(
        made_by="dist_vsd.priors.architectures:RandomPrior",
        checked_by="dist_vsd.priors.architectures:check_random_prior",
        means=is_random_prior,
        attentions=ATTENTIONS,
        compiles=COMPILES,
    ),
    "random_flow": PriorRow(
        made_by="dist_vsd.priors.flow_architectures:RandomFlowPrior",
        checked_by="dist_vsd.priors.flow_architectures:check_random_flow",
        means=is_random_flow,
        targets=FLOW_TARGETS,
        is_flow=True,
    ),
}


def prior_row(name: str) -> PriorRow:
    """Return what is known of the kind of prior that a name means."""
    return next(row for row in reversed(PRIORS.values()) if row.means(name))


def load_prior(
    name: str,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    attention: str = "sdpa",
    compiled: str = "off",
    flow: FlowConfig | None = None,
) -> Prior:
    """Load a prior by its name, of whatever kind it is.

    Args:
        name: as --prior takes it.
        device: of its networks.
        dtype: of their weights; None: fp32.
        attention: what computes its attention, of attention_names.ATTENTIONS.
        compiled: how it is compiled, of compile_names.COMPILES.
        flow: what is asked of one that is a rectified flow; None: nothing.

    Raises:
        ValueError: it is missing, incomplete, damaged or of another kind, or the attention is not there.
    """
    return prior_row(name).load(name, device, dtype, attention, compiled, flow)
