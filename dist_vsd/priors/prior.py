"""What score distillation asks of a frozen diffusion model, latent or not."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from dist_vsd.cameras import Cameras
from dist_vsd.diffusion.guidance import classifier_free_guidance, perp_neg
from dist_vsd.diffusion.process import Process


@dataclasses.dataclass(frozen=True)
class Text:
    """B texts as a denoiser reads them.

    Attributes:
        tokens: (B, num_tokens, width) embeddings of the tokens.
        pooled: (B, pooled_width) embeddings of the whole texts, which the denoisers of SDXL, Stable Diffusion 3 and FLUX want beside them;
            else None.
        projected: (B, N) what the prior's own network makes of the tokens before anything else, whatever x_t and t: the keys and values
            of its attention to the text, which are computed once a text and not in every pass; None: the network computes them.
        mask: (B, num_tokens) 1 where a token is the text's and 0 where it is padding, for a network that does not look at padding; else
            None.
    """

    tokens: Tensor
    pooled: Tensor | None = None
    projected: Tensor | None = None
    mask: Tensor | None = None

    @property
    def fields(self) -> tuple[Tensor | None, ...]:
        """What ``Text(*fields)`` takes."""
        return self.tokens, self.pooled, self.projected, self.mask

    def __len__(self) -> int:
        return self.tokens.shape[0]

    def __getitem__(self, index: slice | Tensor | list[int]) -> Text:
        """Return the rows of an index."""
        return self._each(lambda rows: rows[index])

    def expand(self, count: int) -> Text:
        """Repeat one row ``count`` times, without copying."""
        return self._each(lambda rows: rows.expand(count, *rows.shape[1:]))

    def lerp(self, other: Text, weight: Tensor) -> Text:
        """Return (1 - weight) self + weight other, for (B,) weights; keys and values are linear in the tokens, and follow.

        Of two masks a token is seen that either of the texts has, if its weight is not zero.
        """

        def mix(a: Tensor, b: Tensor) -> Tensor:
            return torch.lerp(a, b, weight.to(a).reshape(-1, *[1] * (a.ndim - 1)))

        pairs = ((self.pooled, other.pooled), (self.projected, other.projected))
        mask = None if self.mask is None or other.mask is None else mix(self.mask, other.mask).gt(0).to(self.mask)
        return Text(mix(self.tokens, other.tokens), *(None if a is None or b is None else mix(a, b) for a, b in pairs), mask)

    @staticmethod
    def cat(texts: Sequence[Text]) -> Text:
        """Join texts into one batch."""

        def join(rows: list[Tensor | None]) -> Tensor | None:
            known = [one for one in rows if one is not None]
            return torch.cat(known) if len(known) == len(texts) else None

        tokens, *others = zip(*(text.fields for text in texts), strict=True)
        return Text(torch.cat(tokens), *map(join, map(list, others)))

    def _each(self, change: Callable[[Tensor], Tensor]) -> Text:
        return Text(*(None if rows is None else change(rows) for rows in self.fields))


NUM_FIELDS = len(dataclasses.fields(Text))


@dataclasses.dataclass(frozen=True)
class TextEmbeddings:
    """B prompts with what guidance steers them away from.

    Attributes:
        cond: of the prompts.
        uncond: of the empty (or negative) prompt, once for each; None where a prior has none, which leaves s = 1 alone.
        negatives: texts that Perp-Neg steers away from, each B rows.
        negative_weights: (len(negatives), B), their weights, negative or zero.
    """

    cond: Text
    uncond: Text | None
    negatives: tuple[Text, ...] = ()
    negative_weights: Tensor | None = None

    def __getitem__(self, index: slice | Tensor | list[int]) -> TextEmbeddings:
        """Return the rows of an index."""
        weights = None if self.negative_weights is None else self.negative_weights[:, index]
        uncond = None if self.uncond is None else self.uncond[index]
        return TextEmbeddings(self.cond[index], uncond, tuple(text[index] for text in self.negatives), weights)

    def expand(self, count: int) -> TextEmbeddings:
        """Repeat one prompt, without what Perp-Neg adds, ``count`` times, without copying."""
        assert not self.negatives
        return TextEmbeddings(self.cond.expand(count), None if self.uncond is None else self.uncond.expand(count))


class Network(Protocol):
    """The network of a prior, an nn.Module, as eps_phi adapts it: what it predicts, and where phi comes in.

    Attributes:
        process: what it predicts.
        adapted: names (or their ends) of the linear layers and convolutions beside which LoRA may stand, by what score.targets calls them.
        time_embedding: the module whose (B, time_width) output conditions every layer on t, to which phi adds its camera's.
        time_width: of that.
        can_be_replayed: whether it calls the same operations whatever its inputs' numbers (see priors/replay.py).
        compiled: how it is compiled, of compile_names.COMPILES.
    """

    process: Process
    adapted: Mapping[str, tuple[str, ...]]
    time_embedding: nn.Module
    time_width: int
    can_be_replayed: bool
    compiled: str

    def __call__(self, x_t: Tensor, t: Tensor, y: Text, cameras: Cameras | None = None) -> Tensor:
        """See Prior.predict."""
        ...

    def recompute(self, through: Callable[..., Any]) -> None:
        """Call each block as through(block, *inputs) wherever a gradient is wanted: for --score.recompute alone."""
        ...


class Prior(Protocol):
    """A frozen text-to-image diffusion model p_t(x_t | y): all that the rest of the program asks of one.

    Attributes:
        process: how x_0 is noised, and what the network predicts.
        network: for eps_phi to adapt; switched off unless phi is asked, so that the prior stays the pretrained model.
        knows_cameras: whether its network makes use of cameras; one that does not is given none.
        camera_is_guided: whether the unconditional branch of guidance is told no camera, as it was trained.
        views_per_shot: V. Samples are V views of one particle each, in neighbouring rows: B is a multiple of V wherever it is asked.
        image_size: height and width of the images that encode() wants, pixels; renders of another size are resized.
        latent_shape: of one view's x_0.
        device: where it computes.
        num_bytes: that its networks hold on the device.
    """

    process: Process
    network: Network
    knows_cameras: bool
    camera_is_guided: bool
    views_per_shot: int
    image_size: int
    latent_shape: tuple[int, ...]
    device: torch.device
    num_bytes: int

    def encode(self, image: Tensor) -> Tensor:
        """Map (B, 3, H, W) images in [0, 1] to x_0; the gradient flows to the image."""
        ...

    def decode(self, x_0: Tensor) -> Tensor:
        """Map x_0 to (B, 3, H, W) images in [0, 1]."""
        ...

    def embed(self, prompts: list[str], negative_prompt: str = "") -> TextEmbeddings:
        """Embed B prompts, each with the negative (or empty) one; ValueError for a text that the prior can't read."""
        ...

    def predict(self, x_t: Tensor, t: Tensor, y: Text, cameras: Cameras | None = None) -> Tensor:
        """Return what the network predicts of x_t, which ``process.eps`` turns into eps; the gradient flows to x_t.

        Args:
            x_t: (B, ...) noised samples.
            t: (B,) times of the process, the same in the V rows of a shot.
            y: B texts.
            cameras: B, from which they are seen, for a prior that knows cameras; zeros (``Cameras.none``), or None, say nothing.
        """
        ...

    def network_of(self, name: str) -> Network:
        """Load another checkpoint's network, for a phi that sits on it; ValueError if it does not fit this prior."""
        ...


def eps_pretrain(
    prior: Prior, x_t: Tensor, t: Tensor, y: TextEmbeddings, guidance_scale: float | Tensor, cameras: Cameras | None = None
) -> Tensor:
    """Predict the noise with guidance: guided_prediction() as eps.

    Guidance acts on what the network predicts, and eps is an affine function of that, so that it is the same as guided eps.

    Args, Returns, Raises:
        As of guided_prediction().
    """
    return prior.process.eps(guided_prediction(prior, x_t, t, y, guidance_scale, cameras), x_t, t)


def guided_prediction(
    prior: Prior, x_t: Tensor, t: Tensor, y: TextEmbeddings, guidance_scale: float | Tensor, cameras: Cameras | None = None
) -> Tensor:
    """Ask the prior with guidance, in one batched call of the network.

    Classifier-free guidance (Ho and Salimans 2022), and Perp-Neg (Armandpour et al. 2023) where ``y`` has negatives. The unconditional
    branch is told neither text nor, where the prior says so, camera, so that guidance is towards both.

    Args:
        prior: the frozen model.
        x_t: (B, ...) noised samples.
        t: (B,) times of the process.
        y: embeddings of B prompts.
        guidance_scale: s, or (B, 1, ...) of them; at 1 and without negatives the unconditional branch is not evaluated.
        cameras: B, from which the samples are seen; see Prior.predict.

    Returns:
        Like x_t; the gradient flows to x_t unless it is switched off around the call.

    Raises:
        ValueError: s is not 1 and ``y`` has no unconditional text.
    """
    return guided_and_conditional(prior, x_t, t, y, guidance_scale, cameras)[0]


def guided_and_conditional(
    prior: Prior, x_t: Tensor, t: Tensor, y: TextEmbeddings, guidance_scale: float | Tensor, cameras: Cameras | None = None
) -> tuple[Tensor, Tensor]:
    """Return guided_prediction(), and beside it what the prior predicts given text and camera, without guidance; arguments as there."""
    if isinstance(guidance_scale, float | int) and guidance_scale == 1.0 and not y.negatives:
        cond = prior.predict(x_t, t, y.cond, cameras)
        return cond, cond
    if y.uncond is None:
        named = f"{guidance_scale:g}" if isinstance(guidance_scale, float | int) else "other than 1"
        raise ValueError(
            f"guidance_scale {named} needs the embedding of a negative (or empty) prompt, this prior has none: use 1"
        )
    texts = [y.uncond, y.cond, *y.negatives]
    count = len(texts)
    known = None
    if cameras is not None:
        uncond_knows = cameras.dropped() if prior.camera_is_guided else cameras
        known = Cameras.cat([uncond_knows, *[cameras] * (count - 1)])
    uncond, cond, *negatives = prior.predict(torch.cat([x_t] * count), t.repeat(count), Text.cat(texts), known).chunk(count)
    if y.negative_weights is None:
        return classifier_free_guidance(uncond, cond, guidance_scale), cond
    return perp_neg(uncond, cond, negatives, y.negative_weights, guidance_scale), cond
