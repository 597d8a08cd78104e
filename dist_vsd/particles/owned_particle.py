"""One particle of a rank: theta with its Adam, and all that has to be kept of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from dist_vsd.optimizer import load_optimizer_tensors, optimizer_tensors
from dist_vsd.particles.particle import Particle

ADAM_BETAS, ADAM_EPS = (0.9, 0.99), 1e-15  # of theta, as in both public implementations (VSD of hash grids)
THETA, OPTIMIZER = "theta/", "optimizer/"


@dataclasses.dataclass(frozen=True)
class OwnedParticle:
    """One particle of this rank.

    Attributes:
        id: counted over the whole run.
        theta: the particle.
        optimizer: Adam over theta.
    """

    id: int
    theta: Particle
    optimizer: torch.optim.Optimizer

    @staticmethod
    def of(particle: int, theta: Particle, trains: Sequence[str] = ()) -> OwnedParticle:
        """Give a particle its optimiser.

        Args:
            particle: its id.
            theta: the particle.
            trains: names of the groups that take steps; the others are frozen. None named: all.

        Raises:
            ValueError: this particle has none of these groups.
        """
        groups = [group for group in theta.parameter_groups() if not trains or group["name"] in trains]
        if not groups:
            has = ", ".join(group["name"] for group in theta.parameter_groups())
            raise ValueError(f"nothing of the particle would be trained: it has {has}, got trains {', '.join(trains)}: change --trains")
        theta.requires_grad_(False)
        for group in groups:
            for parameter in group["params"]:
                parameter.requires_grad_(True)
        return OwnedParticle(particle, theta, torch.optim.Adam(groups, betas=ADAM_BETAS, eps=ADAM_EPS, fused=True))

    @property
    def parameters(self) -> list[Tensor]:
        """All of theta that is trained, in the order of the optimiser."""
        return [parameter for group in self.optimizer.param_groups for parameter in group["params"]]

    @property
    def gradients(self) -> list[Tensor]:
        """The gradients of ``parameters``; zeros where none flowed."""
        return [p.grad if p.grad is not None else torch.zeros_like(p) for p in self.parameters]

    def tensors(self) -> dict[str, Tensor]:
        """Return parameters and grids (``theta/``) and the optimiser's state (``optimizer/``), as they stand."""
        tensors = {f"{THETA}{name}": tensor for name, tensor in self.theta.state_dict().items()}
        names = {parameter: name for name, parameter in self.theta.named_parameters()}
        return tensors | {f"{OPTIMIZER}{k}": v for k, v in optimizer_tensors(self.optimizer, names).items()}

    def replace_tensors(self, moved: Callable[[str, Tensor], Tensor]) -> None:
        """Put others in the place of all tensors: parameters, grids, moments with their count; gradients are dropped.

        New parameters are made of them, as those of one kind of device can't hold the memory of every other.

        Args:
            moved: given a name, always the same for the same one, and a tensor, returns what takes its place.
        """
        self.theta.forget()
        for name, old in list(self.theta.named_parameters()):
            new = torch.nn.Parameter(moved(name, old.detach()), requires_grad=old.requires_grad)
            state = {key: moved(f"{name}/{key}", value) for key, value in sorted(self.optimizer.state.pop(old, {}).items())}
            put_parameter(self.theta, self.optimizer, name, new)
            if state:
                self.optimizer.state[new] = state
        for name, buffer in list(self.theta.named_buffers()):
            module, _, leaf = name.rpartition(".")
            setattr(self.theta.get_submodule(module), leaf, moved(name, buffer))

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """Put back what ``tensors`` returned, of whatever size the particle had then; an absent optimiser's state begins anew."""
        load_theta(self.theta, tensors, self.optimizer)
        names = {parameter: name for name, parameter in self.theta.named_parameters()}
        self.optimizer.state.clear()
        saved = {k.removeprefix(OPTIMIZER): v for k, v in tensors.items() if k.startswith(OPTIMIZER)}
        load_optimizer_tensors(self.optimizer, names, saved)


def load_theta(theta: Particle, tensors: dict[str, Tensor], optimizer: torch.optim.Optimizer | None = None) -> None:
    """Put the parameters and grids of a particle back; one that had grown, or not yet, takes the size that it had then.

    Args:
        theta: the particle.
        tensors: with names that begin with ``theta/``; others are passed over.
        optimizer: of the particle, if any, which is told of parameters of another size.
    """
    saved = {name.removeprefix(THETA): tensor for name, tensor in tensors.items() if name.startswith(THETA)}
    for name, parameter in list(theta.named_parameters()):
        if name in saved and saved[name].shape != parameter.shape:
            replace_parameter(theta, optimizer, name, saved[name].to(parameter))
    for name, buffer in list(theta.named_buffers()):
        if name in saved and saved[name].shape != buffer.shape:
            module, _, leaf = name.rpartition(".")
            setattr(theta.get_submodule(module), leaf, torch.empty_like(saved[name], device=buffer.device))
    theta.load_state_dict(saved)


def replace_parameter(
    theta: torch.nn.Module, optimizer: torch.optim.Optimizer | None, name: str, value: Tensor, rows: Tensor | None = None
) -> None:
    """Replace a parameter by one of another size.

    Args:
        theta: that holds it.
        optimizer: whose groups hold it, with its moments; or None.
        name: of the parameter, as named_parameters() has it.
        value: the new one.
        rows: (N,) for each row of the new one the old row whose moments it takes over; None: its moments begin anew.
    """
    old = theta.get_parameter(name)
    new = torch.nn.Parameter(value.detach().clone(), requires_grad=old.requires_grad)
    put_parameter(theta, optimizer, name, new)
    if optimizer is None:
        return
    state = optimizer.state.pop(old, None)
    if state and rows is not None:
        optimizer.state[new] = {key: moment if key == "step" else moment[rows] for key, moment in state.items()}


def put_parameter(theta: torch.nn.Module, optimizer: torch.optim.Optimizer | None, name: str, new: torch.nn.Parameter) -> None:
    """Put a parameter in the place of another, in the module and in the optimiser's groups; its state is the caller's to move."""
    module, _, leaf = name.rpartition(".")
    owner = theta.get_submodule(module)
    old = getattr(owner, leaf)
    setattr(owner, leaf, new)
    for group in optimizer.param_groups if optimizer is not None else []:
        group["params"] = [new if parameter is old else parameter for parameter in group["params"]]


def take_rows(theta: torch.nn.Module, optimizer: torch.optim.Optimizer, name: str, rows: Tensor) -> None:
    """Let a particle grow or shrink: row i of the new parameter is row ``rows[i]`` of the old one, with its moments."""
    replace_parameter(theta, optimizer, name, theta.get_parameter(name).detach()[rows], rows)
