"""Loading one network of a pipeline, whole or not at all."""

from __future__ import annotations

import torch
from torch import nn

from dist_vsd.device import is_accelerator
from dist_vsd.priors.pipeline_folder import PipelineFolder


def load_network(kind: type[nn.Module], folder: PipelineFolder, component: str, dtype: torch.dtype) -> nn.Module:
    """Load a component from its folder or from the single file.

    Args:
        kind: its class, of diffusers or transformers.
        folder: checked.
        component: the name of its folder: "unet", "transformer", "vae", "text_encoder" ...
        dtype: of its weights.

    Returns:
        The network, frozen and in evaluation mode, on the CPU.

    Raises:
        ValueError: its weights can't be read, or lack a tensor, or have one in another shape.
    """
    where = str(folder.single_file or folder.path)
    try:
        load = _load_from_folder if folder.single_file is None else _load_from_file
        network, absent = load(kind, folder, component, dtype)
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(f"prior {where!r} is damaged: its {component} can't be loaded ({reason}); copy it anew") from error
    if absent:
        raise ValueError(f"prior {where!r} is damaged: its {component} lacks {len(absent)} tensor(s), {absent[0]} first; copy it anew")
    return network.requires_grad_(False).eval()


def placed(network: nn.Module, device: torch.device | str) -> nn.Module:
    """Move a network to a device; on an accelerator its kernels lie channels-last, as the convolutions of tensor cores take them.

    Activations follow the kernels. The CPU keeps the order of the file, which is the faster one for small networks.
    """
    network = network.to(device)
    return network.to(memory_format=torch.channels_last) if is_accelerator(torch.device(device)) else network


def dtype_of(network: nn.Module) -> torch.dtype:
    """Return the dtype of a network's weights; diffusers' own ``dtype`` goes through all modules first, 2 ms each time."""
    return next(network.parameters()).dtype


def _load_from_folder(kind: type[nn.Module], folder: PipelineFolder, component: str, dtype: torch.dtype) -> tuple[nn.Module, list[str]]:
    network, loading = kind.from_pretrained(
        folder.path / component,
        use_safetensors=True,
        local_files_only=True,
        variant=folder.variants[component],
        output_loading_info=True,
    )
    # The argument for it is called torch_dtype or dtype, by version; diffusers warns of every cast, needed or not.
    network = network if network.dtype == dtype else network.to(dtype)
    # A tensor that the file lacks would be left at random values.
    return network, sorted(map(str, [*loading["missing_keys"], *loading["mismatched_keys"]]))


def _load_from_file(kind: type[nn.Module], folder: PipelineFolder, component: str, dtype: torch.dtype) -> tuple[nn.Module, list[str]]:
    from dist_vsd.priors.single_file import load_from_file

    assert folder.single_file is not None
    network = load_from_file(kind, folder.single_file, folder.path, component, dtype)
    # What the file lacks was left without memory.
    return network, sorted(name for name, parameter in network.named_parameters() if parameter.is_meta)
