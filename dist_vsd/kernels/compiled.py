"""What the compiler makes of each kernel for a GPU, on a machine that needs none: registers, spills, shared memory."""

from __future__ import annotations

import dataclasses
import importlib
import re
import subprocess
import tempfile
from pathlib import Path

FILES = ("sampling", "hash_encoding", "compositing", "rasterization", "silhouettes")
TARGETS = (80, 90, 120)  # compute capabilities: A100, H100, and the RTX 50s


@dataclasses.dataclass(frozen=True, kw_only=True)
class CompiledKernel:
    """A kernel as it was compiled.

    Attributes:
        name: file and function.
        target: compute capability.
        registers: of a thread; at 128 threads a program, up to 40 leave a multiprocessor filled.
        spilled_bytes: of local memory a thread, that did not fit into registers.
        shared_bytes: of shared memory a program.
        num_warps: of a program.
    """

    name: str
    target: int
    registers: int
    spilled_bytes: int
    shared_bytes: int
    num_warps: int


def kernels() -> dict[str, tuple[str, str]]:
    """Return every kernel's file and function, by name; needs triton."""
    found = {}
    for file in FILES:
        module = importlib.import_module(f"dist_vsd.kernels.{file}_triton")
        found |= {f"{file}/{kernel.removesuffix('_kernel')}": (file, kernel) for kernel in module.SIGNATURES}
    return found


def compiled(name: str, target: int, ones: bool = False) -> CompiledKernel:
    """Compile a kernel; needs triton, but no GPU.

    Args:
        name: one of kernels().
        target: compute capability, as 90.
        ones: compile what a launch would whose whole numbers are all 1: it takes a 1 for a constant.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from dist_vsd.kernels.launch import OPTIONS

    file, kernel = kernels()[name]
    module = importlib.import_module(f"dist_vsd.kernels.{file}_triton")
    arguments, constants = module.SIGNATURES[kernel]
    if ones:
        constants = constants | {name: 1 for name, kind in arguments.items() if kind in ("i32", "i64")}
        arguments = {name: kind for name, kind in arguments.items() if name not in constants}
    names = getattr(module, kernel).arg_names
    place = {name: (index,) for index, name in enumerate(names)}
    source = ASTSource(
        fn=getattr(module, kernel),
        signature={name: arguments.get(name, "constexpr") for name in names},
        constexprs={place[constant]: value for constant, value in constants.items()},
        # torch's tensors begin at multiples of 16 bytes, which a launch would see.
        attrs={place[argument]: [["tt.divisibility", 16]] for argument, kind in arguments.items() if kind.startswith("*")},
    )
    result = triton.compile(source, target=GPUTarget("cuda", target, 32), options=OPTIONS)
    used = _resources(result.asm["cubin"])
    return CompiledKernel(
        name=name,
        target=target,
        registers=used["REG"],
        spilled_bytes=used["LOCAL"] + used["STACK"],
        shared_bytes=max(used["SHARED"], result.metadata.shared),
        num_warps=result.metadata.num_warps,
    )


def _resources(cubin: bytes) -> dict[str, int]:
    """Return what cuobjdump, which triton brings, tells of a binary: REG, STACK, SHARED and LOCAL."""
    import triton

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
        words = subprocess.run([tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True).stdout
    return {key: int(value) for key, value in re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", words)}
