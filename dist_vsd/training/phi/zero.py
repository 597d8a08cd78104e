"""phi under DeepSpeed's ZeRO 1, 2 and 3, so that its state moves between DDP and ZeRO and back, moments and all.

Stage 3 also shards the frozen UNet, for priors too large for one GPU. What is written here about DeepSpeed was measured
with version 0.19; the engine runs in fp32 whatever the frozen networks' precision, so phi is fp32 everywhere.
"""

from __future__ import annotations

import torch
from accelerate import Accelerator
from deepspeed.utils import (
    safe_get_full_fp32_param,
    safe_get_full_optimizer_state,
    safe_set_full_fp32_param,
    safe_set_full_optimizer_state,
    safe_set_local_fp32_param,
    safe_set_local_optimizer_state,
)
from torch import Tensor, nn

from dist_vsd.distributed.collectives import Collectives
from dist_vsd.score.lora_score import LoraScore
from dist_vsd.training.phi.loss_scale import LossScale
from dist_vsd.training.phi.trainers import LossOf, Shots

MOMENTS = ("exp_avg", "exp_avg_sq")


class DeepSpeedPhi:
    """phi in a DeepSpeed engine that accelerate made.

    Args:
        score: eps_phi.
        optimizer: torch's AdamW over phi; ZeRO gives each rank a part of its state.
        collectives: of the run.
        loss_scale: see PlainPhi; DeepSpeed multiplies and divides by it.
        accelerator: of this process, with a DeepSpeed plugin.
    """

    same_batches = True  # stages 2 and 3 communicate in every backward pass
    tells_waiting = False  # DeepSpeed's collectives are its own

    def __init__(
        self,
        score: LoraScore,
        optimizer: torch.optim.Optimizer,
        collectives: Collectives,
        loss_scale: LossScale,
        accelerator: Accelerator,
    ) -> None:
        self.score, self._collectives, self.loss_scale = score, collectives, loss_scale
        self.gradient_norm: Tensor | float = 0.0
        self._stage: int = accelerator.state.deepspeed_plugin.zero_stage
        self.same_forwards = self._stage == 3  # a forward pass gathers the UNet's shards
        self._shapes = {name: p.shape for name, p in score.phi().items()}
        self._engine, _ = accelerator.prepare(score, optimizer)
        self._zero.override_loss_scale(loss_scale.value)
        self._world_size, self._rank = accelerator.num_processes, accelerator.process_index
        self._num_bytes = 4 * sum(shape.numel() for shape in self._shapes.values())

    @property
    def _zero(self) -> nn.Module:
        """DeepSpeed's own optimiser, around torch's."""
        return self._engine.optimizer

    def accumulate(self, loss_of: LossOf, shots: Shots, is_last: bool) -> Tensor:
        """See PhiTrainer."""
        self._engine.set_gradient_accumulation_boundary(is_last)
        loss = loss_of(self._engine)
        self._engine.backward(loss * self._world_size)  # DeepSpeed averages over ranks; this undoes the division
        return loss.detach()

    def step(self, lr: float, order: Shots) -> Tensor:
        """See PhiTrainer; DeepSpeed looks at the global norm, so all ranks skip a gradient that is not finite."""
        for group in self._zero.param_groups:
            group["lr"] = lr
        self._engine.step()
        norm = self._engine.get_global_grad_norm()
        self.gradient_norm = float("nan") if norm is None else norm
        self._collectives.count_all_reduce(self._num_bytes, self._world_size)
        is_bad = torch.as_tensor(not self._engine.was_step_applied())
        self.loss_scale.update(is_bad)
        self._zero.override_loss_scale(self.loss_scale.value)
        return is_bad

    def tensors(self) -> dict[str, Tensor]:
        """See PhiTrainer."""
        parameters = self.score.phi().items()
        if self._stage < 3:  # every rank's own copy, which the check compares
            return {name: parameter.detach() for name, parameter in parameters}
        return {name: safe_get_full_fp32_param(parameter).view(self._shapes[name]).clone() for name, parameter in parameters}

    def _flat_states(self) -> list[dict[str, Tensor]]:
        """Return the AdamW states of this rank's parts; empty before the first step."""
        return [state for state in self._zero.optimizer.state.values() if "exp_avg" in state]

    def moments(self) -> dict[str, Tensor]:
        """See PhiTrainer."""
        states = self._flat_states()
        found = self.loss_scale.tensors()
        if not states:
            return found
        for name, parameter in self.score.phi().items():
            for moment in MOMENTS:
                found[f"{name}/{moment}"] = safe_get_full_optimizer_state(parameter, moment).view(self._shapes[name]).clone()
            found[f"{name}/step"] = states[0]["step"].clone().cpu()
        return found

    def load(self, phi: dict[str, Tensor], moments: dict[str, Tensor]) -> None:
        """See PhiTrainer."""
        moments = self.loss_scale.load(moments)
        self._zero.override_loss_scale(self.loss_scale.value)
        if moments:
            steps = {float(value) for name, value in moments.items() if name.endswith("/step")}
            self._make_flat_states(max(steps))
        for name, parameter in self.score.phi().items():
            self._set(parameter, phi[name], "")
            for moment in MOMENTS if moments else ():
                self._set(parameter, moments[f"{name}/{moment}"], moment)
        self._push()

    def _make_flat_states(self, step: float) -> None:
        """Give torch's AdamW the states that it would make in its first step."""
        zero = self._zero
        flats = zero.fp32_partitioned_groups_flat if self._stage == 3 else zero.single_partition_of_fp32_groups
        for flat in flats:
            moments = {moment: torch.zeros_like(flat) for moment in MOMENTS}
            zero.optimizer.state[flat] = {"step": torch.tensor(step), **moments}
        if self._stage < 3:
            zero._lazy_init_hp_params_optimizer_state()

    def _set(self, parameter: nn.Parameter, value: Tensor, moment: str) -> None:
        value = value.to(torch.float32)
        if self._stage < 3:
            value = value.to(parameter.device)
            _ = safe_set_full_optimizer_state(parameter, value, moment) if moment else safe_set_full_fp32_param(parameter, value)
            return
        # Each rank takes its slice, padded at the end: the functions for whole tensors fail where the ranks don't divide it.
        size = parameter.ds_tensor.numel()
        padded = torch.zeros(size * self._world_size)
        padded[: value.numel()] = value.flatten()
        own = padded[self._rank * size : (self._rank + 1) * size]
        _ = safe_set_local_optimizer_state(parameter, own, moment) if moment else safe_set_local_fp32_param(parameter, own)

    def _push(self) -> None:
        """Bring the fp32 master, which load() wrote, into the parameters that the forward pass uses (collective)."""
        zero = self._zero
        if self._stage < 3:
            zero.update_lp_params()
            return
        zero._partition_all_parameters()
        for group in range(len(zero.fp16_groups)):
            zero._reassign_or_swap_out_partitioned_parameters(group)
        if zero.persistent_parameters:
            zero.persistent_parameters[0].all_gather(zero.persistent_parameters)
