"""The kernels of radiance fields and meshes in C for a CPU: c_kernels.c, compiled in a second by the machine's compiler, and kept.

Plain torch makes many passes over memory where these make one, each sample's numbers staying in registers. Each function takes contiguous
fp32 tensors on the CPU (int32 for rays and slots, int64 for vertices of faces), and computes on one core.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch
from torch import Tensor

from dist_vsd.cache_folder import cache_folder

SOURCE = Path(__file__).with_suffix(".c")
COMPILERS = ("cc", "gcc", "clang")
MOST_FEATURES, MOST_WIDTH = 64, 256  # of a level, and of a layer; as c_kernels.c has them
LANES = 16  # of a sum
# Without fused multiply-adds points fall into the same cells as in plain torch; without reordering, bits are the same on every machine.
OPTIONS = ("-O3", "-march=native", "-ffp-contract=off", "-std=c11", "-shared", "-fPIC")


class CompilerError(RuntimeError):
    """The kernels can't be compiled here."""


@functools.cache
def lacking() -> str:
    """Return what is lacking for these kernels, or nothing; they are compiled, if they were not yet."""
    try:
        _library()
    except CompilerError as error:
        return str(error)
    return ""


@functools.cache
def _library() -> ctypes.CDLL:
    compiler = os.environ.get("CC") or next(filter(shutil.which, COMPILERS), None)
    if compiler is None:
        raise CompilerError("no C compiler is found: install gcc")
    identity = [SOURCE.read_bytes(), *map(str.encode, (compiler, *OPTIONS, _processor()))]
    name = f"{hashlib.sha256(b' '.join(identity)).hexdigest()[:32]}.so"
    try:
        if (folder := cache_folder()) is not None:
            return ctypes.CDLL(str(_compiled(compiler, folder / "kernels" / name)))
    except OSError:  # not writable, or not to be executed from
        pass
    with tempfile.TemporaryDirectory() as folder_of_this_process:
        try:
            return ctypes.CDLL(str(_compiled(compiler, Path(folder_of_this_process, name))))
        except OSError as error:
            raise CompilerError(f"what the C compiler makes can't be loaded ({error})") from error


def _processor() -> str:
    """Describe what -march=native means here: a home may be shared by machines of several kinds."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return platform.machine() + next((line for line in lines if line.startswith(("flags", "Features"))), "")


def _compiled(compiler: str, file: Path) -> Path:
    """Compile, unless a process did before; OSError where it can't be written, CompilerError where the compiler fails."""
    if file.exists():
        return file
    file.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=file.parent) as beside:
        made = Path(beside, "made")
        try:
            subprocess.run([compiler, *OPTIONS, "-o", made, SOURCE, "-lm"], check=True, capture_output=True, text=True)
        except (OSError, subprocess.CalledProcessError) as error:
            said = (getattr(error, "stderr", "") or str(error)).strip().splitlines()
            raise CompilerError(f"the C compiler {compiler} fails: {said[0][:200] if said else error}") from error
        os.replace(made, file)  # ranks that begin together each put a whole one
    return file


def _call(name: str, *arguments: Tensor | float) -> int:
    """Call a kernel: tensors by their address, whole numbers as the 64 or 32 bits that it takes, others as fp32."""
    function = getattr(_library(), name)
    function.restype = ctypes.c_int64
    return function(*(ctypes.c_void_p(one.data_ptr()) if isinstance(one, Tensor) else one for one in arguments))


_int, _long, _float = ctypes.c_int, ctypes.c_int64, ctypes.c_float


def sample(
    origins: Tensor, directions: Tensor, offset: Tensor, near: Tensor, step: Tensor, binaries: Tensor, bound: float, num_samples: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return ray, t, delta (M,) and first (N + 1,) of all samples in occupied cells (see sample_occupied).

    Args:
        origins, directions: (N, 3).
        offset: (N,) in units of a step.
        near, step: (N,) of stretch().
        binaries: (R, R, R) booleans.
        bound: of the cube.
        num_samples: intervals of a ray.
    """
    count, resolution = len(origins), binaries.shape[0]
    ray, first = torch.empty(count * num_samples, dtype=torch.int32), torch.empty(count + 1, dtype=torch.int32)
    t, delta = torch.empty(2, count * num_samples)
    sizes = (_long(count), _int(num_samples), _int(resolution), _float(bound), _float(resolution / (2 * bound)))
    num_kept = _call("sample", origins, directions, offset, near, step, binaries, *sizes, ray, t, delta, first)
    return ray[:num_kept].clone(), t[:num_kept].clone(), delta[:num_kept].clone(), first


def points(origins: Tensor, directions: Tensor, ray: Tensor, t: Tensor) -> Tensor:
    """Return (M, 3) points at (M,) distances on rays of (N, 3) origins and directions."""
    out = torch.empty(len(t), 3)
    _call("points", origins, directions, ray, t, _long(len(t)), out)
    return out


def encode(points: Tensor, table: Tensor, resolutions: Tensor) -> Tensor:
    """Interpolate trilinearly in several grids; what lies outside is taken to the border.

    Args:
        points: (N, 3) in [-1, 1]^3.
        table: (vertices of all levels, F).
        resolutions: (L,) int64, vertices a side of each level.

    Returns:
        (N, L F).
    """
    sizes = (_long(len(points)), _int(len(resolutions)), _int(table.shape[1]))
    out = torch.empty(len(points), len(resolutions) * table.shape[1])
    _call("encode", points, table, resolutions, *sizes, out)
    return out


def encode_backward(points: Tensor, cotangent: Tensor, resolutions: Tensor, table_shape: torch.Size) -> Tensor:
    """Return the gradient of encode()'s table, given the (N, L F) cotangent of its result."""
    gradient = torch.zeros(table_shape)
    sizes = (_long(len(points)), _int(len(resolutions)), _int(table_shape[1]))
    _call("encode_backward", points, cotangent, resolutions, *sizes, gradient)
    return gradient


def composite(density: Tensor, color: Tensor, t: Tensor, delta: Tensor, first: Tensor) -> tuple[Tensor, ...]:
    """Return weights, transmittance, color, opacity and depth, given (M,) and (M, 3) of a field and the slots of Samples."""
    num_rays, num_slots = len(first) - 1, len(density)
    weights, transmittance = torch.empty(2, num_slots)
    color_out, opacity, depth = torch.empty(num_rays, 3), torch.empty(num_rays), torch.empty(num_rays)
    made = (weights, transmittance, color_out, opacity, depth)
    _call("composite", density, color, t, delta, first, _long(num_rays), _long(num_slots), *made)
    return made


def composite_backward(
    density: Tensor, color: Tensor, t: Tensor, delta: Tensor, first: Tensor, weights: Tensor, transmittance: Tensor, *cotangents: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the gradients of density and color, given what composite() took and made, and cotangents of all but transmittance."""
    of_density, of_color = torch.empty_like(density), torch.empty_like(color)
    given = (density, color, t, delta, first, weights, transmittance, *(one.contiguous() for one in cotangents))
    _call("composite_backward", *given, _long(len(first) - 1), _long(len(density)), of_density, of_color)
    return of_density, of_color


def nearest_faces(xyw: Tensor, faces: Tensor, size: int, near: float, margin: float) -> Tensor:
    """Return the (B, size, size) int64 face that each pixel sees, given (B, V, 3) vertices and (F, 3) faces (see rasterization.py)."""
    nearest = torch.full((len(xyw), size, size), -1, dtype=torch.int32)
    sizes = (*map(_long, (*xyw.shape[:2], len(faces))), _int(size), _float(near), _float(margin))
    _call("nearest_faces", xyw, faces, *sizes, torch.full(nearest.shape, torch.inf), nearest)
    return nearest.long()


def crossing_edges(
    xyw: Tensor, faces: Tensor, across: Tensor, is_turned: Tensor, face: Tensor, depth: Tensor, near: float, num_steps: int
) -> Tensor:
    """Return (2, B, size, size) int64 silhouettes between neighbouring pixels (see silhouettes.py)."""
    found = torch.empty(2, *face.shape, dtype=torch.int64)
    sizes = (*map(_long, xyw.shape[:2]), _int(face.shape[1]), _float(near), _int(num_steps))
    _call("crossing_edges", xyw, faces, across, is_turned, face, depth, *sizes, found)
    return found


def two_layers(x: Tensor, hidden: Tensor, hidden_bias: Tensor, output: Tensor, output_bias: Tensor) -> Tensor:
    """Return (N, O) of two linear layers with a ReLU between them (see kernels/two_layers.py)."""
    out = torch.empty(len(x), len(output))
    sizes = (_long(len(x)), *map(_int, (x.shape[1], *output.shape[::-1])))
    _call("two_layers", x, hidden, hidden_bias, output, output_bias, *sizes, out)
    return out


def two_layers_backward(x: Tensor, hidden: Tensor, hidden_bias: Tensor, output: Tensor, cotangent: Tensor) -> tuple[Tensor, ...]:
    """Return the gradients of x, hidden, its bias, output and its bias, given the (N, O) cotangent of two_layers()."""
    num_out, num_hidden = output.shape
    gradients = (torch.empty_like(x), torch.empty_like(hidden), torch.empty_like(hidden_bias), torch.empty_like(output))
    gradients = (*gradients, torch.empty(num_out))
    scratch = torch.zeros((hidden.numel() + output.numel() + num_hidden + num_out) * LANES)
    sizes = (_long(len(x)), *map(_int, (x.shape[1], num_hidden, num_out)))
    _call("two_layers_backward", x, hidden, hidden_bias, output, cotangent, *sizes, scratch, *gradients)
    return gradients
