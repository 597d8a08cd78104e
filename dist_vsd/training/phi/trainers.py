"""How phi takes a step from the renders of all ranks: by itself, in a fixed order, or through accelerate (DDP).

A trainer is given the loss of one micro-batch after another, each already divided by the global number of renders, and then
takes one step with the SUM of the gradients over all ranks. training/phi/zero.py holds the one for ZeRO.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from accelerate import Accelerator
from accelerate.utils import AutocastKwargs, DistributedDataParallelKwargs
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from dist_vsd.distributed.collectives import Collectives
from dist_vsd.optimizer import load_optimizer_tensors, optimizer_tensors, step_unless
from dist_vsd.score.lora_score import LoraScore
from dist_vsd.training.phi.loss_scale import LossScale

LossOf = Callable[[Callable[..., Tensor]], Tensor]
Shots = Sequence[tuple[int, int]]  # (particle, number) of each shot of a micro-batch


class PhiTrainer(Protocol):
    """What an update and a checkpoint ask of phi and its optimiser, however its gradients travel.

    Attributes:
        score: eps_phi.
        same_batches: whether every rank must run the same number of micro-batches.
        same_forwards: whether that also holds for passes without gradient.
        tells_waiting: whether the time that it spends in collectives goes into Collectives.waited_seconds.
        gradient_norm: of the last step, over all ranks; a tensor on the device (no CPU-GPU sync), or a number.
        loss_scale: the factor on the loss, the same on all ranks.
    """

    score: LoraScore
    same_batches: bool
    same_forwards: bool
    tells_waiting: bool
    gradient_norm: Tensor | float
    loss_scale: LossScale

    def accumulate(self, loss_of: LossOf, shots: Shots, is_last: bool) -> Tensor:
        """Add the gradient of a micro-batch's summed loss; return the loss, detached.

        Args:
            loss_of: computes the loss from eps_phi, which it may call once.
            shots: of the micro-batch.
            is_last: whether it is the last before step().
        """

    def step(self, lr: float, order: Shots) -> Tensor:
        """Sum the gradients over ranks and take AdamW's step, or skip it on all ranks if they are not finite (collective).

        Args:
            lr: learning rate.
            order: all shots of all ranks that were accumulated.

        Returns:
            Whether it was skipped, () bool on the device: nobody waits for it.
        """

    def tensors(self) -> dict[str, Tensor]:
        """Return phi by name, whole, on every rank (collective under ZeRO 3)."""

    def moments(self) -> dict[str, Tensor]:
        """Return AdamW's state as ``<name>/exp_avg``, ``<name>/exp_avg_sq`` and ``<name>/step``, and the loss scale (collective)."""

    def load(self, phi: dict[str, Tensor], moments: dict[str, Tensor]) -> None:
        """Put phi, AdamW's state and the loss scale back (collective under ZeRO)."""


class PlainPhi:
    """phi on one process, or on several with a sum of our own.

    Args:
        score: eps_phi.
        optimizer: AdamW over phi.
        collectives: of the run.
        loss_scale: the loss is multiplied by it before backward and the gradients divided after: small fp16 gradients survive.
    """

    same_batches = same_forwards = False
    tells_waiting = True

    def __init__(self, score: LoraScore, optimizer: torch.optim.Optimizer, collectives: Collectives, loss_scale: LossScale) -> None:
        self.score, self.optimizer, self._collectives, self.loss_scale = score, optimizer, collectives, loss_scale
        self._parameters = list(score.phi().values())
        self.gradient_norm: Tensor | float = 0.0

    def accumulate(self, loss_of: LossOf, shots: Shots, is_last: bool) -> Tensor:
        """See PhiTrainer."""
        loss = loss_of(self.score)
        (loss * self.loss_scale.factor).backward()
        return loss.detach()

    def _reduce(self, order: Shots) -> None:
        self._collectives.sum_over_ranks([p.grad for p in self._parameters])

    def step(self, lr: float, order: Shots) -> Tensor:
        """See PhiTrainer."""
        for parameter in self._parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            if self.loss_scale.is_used:
                parameter.grad /= self.loss_scale.factor
        self._reduce(order)
        norm = nn.utils.get_total_norm([p.grad for p in self._parameters])
        self.gradient_norm, is_bad = norm, ~norm.isfinite()  # after the sum every rank holds the same gradient, so all decide alike
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        step_unless(is_bad, self.optimizer)
        self.optimizer.zero_grad(set_to_none=True)
        self.loss_scale.update(is_bad)
        return is_bad

    def tensors(self) -> dict[str, Tensor]:
        """See PhiTrainer."""
        return dict(self.score.phi())

    def _names(self) -> dict[Tensor, str]:
        return {parameter: name for name, parameter in self.score.phi().items()}

    def moments(self) -> dict[str, Tensor]:
        """See PhiTrainer."""
        return optimizer_tensors(self.optimizer, self._names()) | self.loss_scale.tensors()

    def load(self, phi: dict[str, Tensor], moments: dict[str, Tensor]) -> None:
        """See PhiTrainer."""
        with torch.no_grad():
            for name, parameter in self.score.phi().items():
                parameter.copy_(phi[name])
        load_optimizer_tensors(self.optimizer, self._names(), self.loss_scale.load(moments))


class OrderedPhi(PlainPhi):
    """phi in the deterministic mode: each shot's gradient by itself, summed in the order of particles and shots.

    Args:
        score, optimizer, collectives, loss_scale: see PlainPhi.
    """

    def __init__(self, score: LoraScore, optimizer: torch.optim.Optimizer, collectives: Collectives, loss_scale: LossScale) -> None:
        super().__init__(score, optimizer, collectives, loss_scale)
        self._rows: dict[tuple[int, int], list[Tensor]] = {}

    def accumulate(self, loss_of: LossOf, shots: Shots, is_last: bool) -> Tensor:
        """See PhiTrainer; takes one shot at a time."""
        (shot,) = shots
        loss = super().accumulate(loss_of, shots, is_last)
        self._rows[shot] = [p.grad if p.grad is not None else torch.zeros_like(p) for p in self._parameters]
        for parameter in self._parameters:
            parameter.grad = None
        return loss

    def _reduce(self, order: Shots) -> None:
        rows = {shot: [g / self.loss_scale.factor for g in gradients] for shot, gradients in self._rows.items()}
        for parameter, total in zip(self._parameters, self._collectives.sum_in_order(rows, order, "ranks", self._parameters), strict=True):
            parameter.grad = total
        self._rows = {}


class DataParallelPhi(PlainPhi):
    """phi under DistributedDataParallel, made by accelerate: buckets of gradients travel while the backward pass goes on.

    The frozen UNet's own weights need no gradient and never travel.

    Args:
        score, optimizer, collectives, loss_scale: see PlainPhi.
        accelerator: of this process.
    """

    def __init__(
        self,
        score: LoraScore,
        optimizer: torch.optim.Optimizer,
        collectives: Collectives,
        loss_scale: LossScale,
        accelerator: Accelerator,
    ) -> None:
        super().__init__(score, optimizer, collectives, loss_scale)
        # Without find_unused_parameters DDP lays its buckets anew after the first backward pass, and with them the order of a
        # sum over more than two ranks: a resumed run would then differ in its first update from one that went on.
        accelerator.ddp_handler = DistributedDataParallelKwargs(gradient_as_bucket_view=True, find_unused_parameters=True)
        # The networks were cast when they were loaded; autocast would cast LoRA's matrices, which eps_phi's scores leave in fp32.
        accelerator.autocast_handler = AutocastKwargs(enabled=False)
        frozen = [name for name, p in score.named_parameters() if not p.requires_grad] + [n for n, _ in score.named_buffers()]
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(score, frozen)
        self._ddp: nn.Module = accelerator.prepare_model(score)
        self._world_size = accelerator.num_processes
        self._num_bytes = 4 * sum(p.numel() for p in self._parameters)

    def accumulate(self, loss_of: LossOf, shots: Shots, is_last: bool) -> Tensor:
        """See PhiTrainer; the gradients of the last micro-batch take those of the others along."""
        with contextlib.nullcontext() if is_last else self._ddp.no_sync():
            if is_last and self._collectives.is_timed:
                self._ddp._set_ddp_runtime_logging_sample_rate(1)  # of this pass
            loss = loss_of(self._ddp)
            # DDP averages over ranks; this undoes the division.
            (loss * (self.loss_scale.factor * self._world_size)).backward()
        if is_last and self._collectives.is_timed:
            self._collectives.waited_seconds += self._exposed_seconds()
        return loss.detach()

    def _exposed_seconds(self) -> float:
        """Return the time of the last pass in which DDP communicated, or waited for other ranks, and nothing was computed.

        DDP keeps no time of its very first pass: 0.
        """
        self._ddp.logger.set_runtime_stats_and_log()  # CPU-GPU sync
        times = self._ddp._get_ddp_logging_data()
        self._ddp._set_ddp_runtime_logging_sample_rate(1 << 30)
        return max(0.0, times.get("backward_comm_time", 0) - times.get("backward_compute_comm_overlap_time", 0)) / 1e9

    def _reduce(self, order: Shots) -> None:
        self._collectives.count_all_reduce(self._num_bytes, self._world_size)  # done inside backward
