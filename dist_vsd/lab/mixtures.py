"""The laboratory's mixtures: a few by name, and any other from a JSON or YAML file."""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from dist_vsd.diffusion.process import Process, RectifiedFlow, VariancePreserving
from dist_vsd.lab.settings import Settings
from dist_vsd.priors.gaussian_mixture import GaussianMixturePrior

# Stable Diffusion's schedule.
SCHEDULE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "num_train_timesteps": 1000}
SUFFIXES = (".json", ".yaml", ".yml")
COMPONENT_KEYS = {"weight", "mean", "std", "covariance"}
EXAMPLE = "{components: [{weight: 1, mean: [0, 0], std: 1}]}"


def four_gaussians() -> tuple[Tensor, Tensor, Tensor]:
    """Return four round modes of unequal weights in the plane, on which SDS loses the light ones."""
    means = torch.tensor([[2.0, 2.0], [-2.0, 2.0], [-2.0, -2.0], [2.0, -2.0]])
    return means, torch.full((4,), 0.35**2), torch.tensor([0.4, 0.3, 0.2, 0.1])


def ring() -> tuple[Tensor, Tensor, Tensor]:
    """Return eight equal modes on a circle in the plane."""
    angles = torch.arange(8) * (2 * math.pi / 8)
    return 2.5 * torch.stack([angles.cos(), angles.sin()], -1), torch.full((8,), 0.25**2), torch.full((8,), 1 / 8)


def ellipses() -> tuple[Tensor, Tensor, Tensor]:
    """Return three long modes in the plane, each turned its own way (full covariances)."""
    angles = torch.tensor([0.5, 2.2, 1.2])
    axes = torch.stack([torch.stack([angles.cos(), -angles.sin()], -1), torch.stack([angles.sin(), angles.cos()], -1)], -2)
    covariances = axes @ torch.diag(torch.tensor([0.9, 0.18]).square()) @ axes.mT
    return torch.tensor([[-1.8, 1.0], [1.6, 1.2], [0.2, -1.8]]), covariances, torch.tensor([0.5, 0.3, 0.2])


def sixteen_dimensions() -> tuple[Tensor, Tensor, Tensor]:
    """Return four modes in 16 dimensions, with correlated coordinates (0.6^|i - j|)."""
    means = torch.zeros(4, 16)
    means[:, :2] = four_gaussians()[0]
    distance = (torch.arange(16)[:, None] - torch.arange(16)).abs()
    return means, (0.35**2 * 0.6**distance).expand(4, -1, -1).clone(), torch.tensor([0.4, 0.3, 0.2, 0.1])


MIXTURES: dict[str, Callable[[], tuple[Tensor, Tensor, Tensor]]] = {
    "four_gaussians": four_gaussians,
    "ring": ring,
    "ellipses": ellipses,
    "sixteen_dimensions": sixteen_dimensions,
}


def process_of(settings: Settings) -> Process:
    """Return what the settings' samples are noised by."""
    if settings.process == "rectified_flow":
        return RectifiedFlow(settings.shift)
    return VariancePreserving.from_scheduler_config(SCHEDULE)


def load_mixture(name: str, process: Process | None = None) -> GaussianMixturePrior:
    """Return a mixture by its name, or from a file.

    Args:
        name: one of MIXTURES, or the path of a .json, .yaml or .yml file as read_mixture takes it.
        process: of the prior; None: the default of the settings, Stable Diffusion's schedule.

    Raises:
        ValueError: an unknown name, or a file that can't be read or holds no mixture.
    """
    process = process or process_of(Settings())
    if name in MIXTURES:
        return GaussianMixturePrior(*MIXTURES[name](), process)
    if Path(name).suffix.lower() not in SUFFIXES:
        near = difflib.get_close_matches(name, MIXTURES, n=1)
        hint = f" (did you mean {near[0]}?)" if near else ""
        raise ValueError(f"mixture {name[:80]!r} does not exist{hint}: use one of {', '.join(MIXTURES)}, or a {', '.join(SUFFIXES)} file")
    try:
        return GaussianMixturePrior(*read_mixture(Path(name)), process)
    except ValueError as error:
        raise ValueError(f"--mixture {name[:100]}: {error}") from error


def read_mixture(file: Path) -> tuple[Tensor, Tensor, Tensor]:
    """Read means, covariances and weights from a file with one list, ``components``.

    Each component has a ``weight``, a ``mean`` of D numbers, and either ``std``, one number, or ``covariance``, D rows of D numbers.

    Returns:
        (K, D), (K,) variances or (K, D, D), (K,); what they must satisfy is GaussianMixturePrior's to check.

    Raises:
        ValueError: it can't be read, or is not of that form.
    """
    content = _parse(file)
    components = content.get("components") if isinstance(content, dict) and set(content) == {"components"} else None
    if not isinstance(components, list) or not components:
        raise ValueError(f"the file must hold a list of components and nothing else, as in {EXAMPLE}: rewrite it")
    for k, component in enumerate(components):
        _check_component(k, component)
    num_dimensions = len(components[0]["mean"])
    for k, component in enumerate(components):
        _check_size(k, component, num_dimensions)
    means = torch.tensor([component["mean"] for component in components], dtype=torch.float32)
    weights = torch.tensor([component["weight"] for component in components], dtype=torch.float64)
    return means, _covariances(components, num_dimensions), weights


def _parse(file: Path) -> Any:
    try:
        text = file.read_text(encoding="utf-8")
        return json.loads(text) if file.suffix.lower() == ".json" else yaml.safe_load(text)
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"it can't be read ({type(error).__name__}): check the path") from error
    except (ValueError, yaml.YAMLError, RecursionError) as error:
        raise ValueError(f"it is not valid {file.suffix.lower().strip('.').upper()} ({type(error).__name__}): correct it") from error


def _check_component(k: int, component: Any) -> None:
    """Refuse a component with unknown or missing keys, or with values that are not numbers."""
    if not isinstance(component, dict):
        raise ValueError(f"component {k} must hold weight, mean and std or covariance, got {str(component)[:60]!r}: rewrite it")
    unknown = [str(key) for key in component if key not in COMPONENT_KEYS]
    if unknown:
        raise ValueError(f"component {k} has the unknown key {unknown[0][:60]!r}: use weight, mean, and std or covariance")
    missing = [key for key in ("weight", "mean") if key not in component]
    if missing or ("std" in component) == ("covariance" in component):
        lacks = f"lacks {missing[0]!r}" if missing else "must have one of std and covariance"
        raise ValueError(f"component {k} {lacks}: give weight, mean, and std or covariance")
    for key, depth in (("weight", 0), ("mean", 1), ("std", 0), ("covariance", 2)):
        if key in component and not _is_numbers(component[key], depth):
            wanted = ("a number", "a list of numbers", "a list of rows of numbers")[depth]
            raise ValueError(f"component {k}: {key} must be {wanted}, got {str(component[key])[:60]!r}: change it")
    if component.get("std", 1) <= 0:
        raise ValueError(f"component {k}: std must be above 0, got {component['std']}: raise it")


def _is_numbers(value: Any, depth: int) -> bool:
    if depth:
        return isinstance(value, list) and bool(value) and all(_is_numbers(item, depth - 1) for item in value)
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _check_size(k: int, component: dict[str, Any], num_dimensions: int) -> None:
    if len(component["mean"]) != num_dimensions:
        raise ValueError(f"component {k}: mean must have as many numbers as the first's, {num_dimensions}, got {len(component['mean'])}")
    rows = component.get("covariance")
    if rows is not None and {len(rows), *map(len, rows)} != {num_dimensions}:
        raise ValueError(f"component {k}: covariance must have {num_dimensions} rows of {num_dimensions} numbers: correct it")


def _covariances(components: list[dict[str, Any]], num_dimensions: int) -> Tensor:
    """Return (K,) variances if all components are round, else (K, D, D)."""
    if all("std" in component for component in components):
        return torch.tensor([component["std"] for component in components], dtype=torch.float64).square().float()
    identity = torch.eye(num_dimensions, dtype=torch.float64)
    matrices = [
        component["std"] ** 2 * identity if "std" in component else torch.tensor(component["covariance"], dtype=torch.float64)
        for component in components
    ]
    return torch.stack(matrices).float()
