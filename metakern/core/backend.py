"""Backend selection: which implementation serves a call.

``auto`` (the default) takes the fastest that works here and warns once, with a :class:`FallbackWarning`, when only the
plain PyTorch reference does. A backend requested by name either runs or raises. The environment variable
``METAKERN_BACKEND``, read when the package is imported, replaces ``auto``.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.metadata
import importlib.util
import os
from typing import Any, NamedTuple

import torch

from metakern.core.machine import cpu_model
from metakern.core.version import __version__
from metakern.core.warn import warn_user

#: Names that ``backend=`` takes.
BACKENDS = ("auto", "cpp", "cuda", "triton", "reference")

#: Backends that auto tries per device type, fastest first; the reference is the last resort.
PREFERRED = {"cpu": ("cpp",), "cuda": ("cuda", "triton")}

_C: Any
try:
    from metakern import _C  # type: ignore[attr-defined,no-redef]

    _missing = ""
except (ImportError, RuntimeError) as error:  # the package must import without its kernels
    _C = None
    _reason = str(error)
    if importlib.util.find_spec("metakern._C") is None:  # Python's own message would blame a circular import
        _reason = "metakern._C is not part of this installation: METAKERN_BUILD=0 leaves it out, and so does Windows"
    _missing = f"the compiled kernels could not be loaded ({_reason})"
else:
    _C.cpu_capability()  # ValueError if METAKERN_CPU_CAPABILITY requests an unavailable instruction set

_override = os.environ.get("METAKERN_BACKEND", "") or "auto"
if _override not in BACKENDS:
    raise ValueError(f"METAKERN_BACKEND must be one of {', '.join(BACKENDS)}, got {_override!r}")


def is_compiled() -> bool:
    """Whether the compiled kernels were found and loaded."""
    return _C is not None


@functools.cache
def autograd_library() -> Any:
    """The library that records calls as nodes of C++; None if it was not built, or not with this torch.

    It is loaded by the first call that may be recorded.
    """
    if _C is None or _C.torch_version != torch.__version__:  # another torch may have another interface of autograd
        return None
    with contextlib.suppress(ImportError):
        return importlib.import_module("metakern._autograd")
    return None


_HAS_TRITON = importlib.util.find_spec("triton") is not None


def _architecture_list() -> list[str]:
    return [] if _C is None else _C.cuda_architectures.replace(";", " ").split()


class Architecture(NamedTuple):
    """One entry of TORCH_CUDA_ARCH_LIST."""

    version: tuple[int, int]
    specific: bool  # "9.0a": code for this chip alone
    ptx: bool  # "9.0+PTX": later devices compile the PTX themselves

    @classmethod
    def parse(cls, entry: str) -> Architecture:
        """Parse an entry such as "9.0", "9.0a" or "10.0+PTX"."""
        number, _, ptx = entry.partition("+")
        major, minor = number.rstrip("af").split(".")
        return cls((int(major), int(minor)), number[-1] in "af", bool(ptx))

    def runs_on(self, capability: tuple[int, int]) -> bool:
        """Whether a device of this compute capability runs code for this architecture."""
        if self.specific or self.version > capability:
            return self.version == capability
        return self.ptx or self.version[0] == capability[0]


_ARCHITECTURES = [Architecture.parse(entry) for entry in _architecture_list()]

_warned: set[str] = set()


class FallbackWarning(UserWarning):
    """A call falls back to the plain PyTorch reference, because no kernel can serve it.

    Example:
        >>> import warnings
        >>> warnings.simplefilter("ignore", metakern.FallbackWarning)  # plain PyTorch is expected here
    """


def missing(name: str, device: torch.device) -> str:
    """Why the backend ``name`` cannot serve tensors on ``device``; empty where it can."""
    if name == "triton":
        if not _HAS_TRITON:
            return "Triton is not installed (pip install 'metakern[triton]')"
        if device.type == "cuda" or (device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1"):
            return ""
        return f"Triton's kernels serve tensors on cuda (on the CPU with TRITON_INTERPRET=1), not on {device.type}"
    if _C is None:
        return _missing + "; reinstall metakern with a C++ compiler at hand"
    if name == "cpp":
        return "" if device.type == "cpu" else f"the C++ kernels serve tensors on the CPU, not on {device.type}"
    if device.type != "cuda":
        return f"the CUDA kernels serve tensors on cuda, not on {device.type}"
    if not _ARCHITECTURES:
        return "metakern was built without CUDA; reinstall it with METAKERN_CUDA=1, and nvcc on PATH or CUDA_HOME set"
    properties = torch.cuda.get_device_properties(device)
    capability = (properties.major, properties.minor)
    if any(architecture.runs_on(capability) for architecture in _ARCHITECTURES):
        return ""
    number = ".".join(map(str, capability))
    return (
        f"{device} has compute capability {number}, metakern was built for {_C.cuda_architectures}; reinstall it with "
        f"TORCH_CUDA_ARCH_LIST={number}"
    )


def prefers_triton(backend: str | None = None) -> bool:
    """Whether Triton's kernels will serve GPUs, decided without initializing CUDA, which would break it in forks."""
    name = _override if backend in (None, "auto") else backend
    by_auto = name == "auto" and torch.backends.cuda.is_built() and not _ARCHITECTURES
    return _HAS_TRITON and (name == "triton" or by_auto)


def requested(backend: str | None) -> str:
    """The backend name that a call requests; ``METAKERN_BACKEND`` replaces auto.

    Raises:
        ValueError: for a name that is not one of :data:`BACKENDS`
    """
    check_backend(backend)
    return _override if backend is None or backend == "auto" else backend


def check_backend(backend: str | None) -> None:
    """Raise ValueError unless ``backend`` is None or one of :data:`BACKENDS`."""
    if backend is not None and backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, got {backend!r}")


def resolve(backend: str | None, device: torch.device, unserved: dict[str, str] | None = None) -> str:
    """The backend that serves a call on ``device``: one of :data:`BACKENDS` but "auto".

    ``unserved`` maps backends that do not serve this call to the reason.

    Raises:
        ValueError: for a name that is not one of :data:`BACKENDS`
        RuntimeError: for a backend requested by name that cannot run here
    """
    name = _override if backend in (None, "auto") else backend
    if name == "reference":
        return name
    check_backend(name)
    reasons = {}
    for candidate in PREFERRED.get(device.type, ("cpp",)) if name == "auto" else (name,):
        reason = (unserved or {}).get(candidate, "") or missing(candidate, device)
        if not reason:
            return candidate
        reasons[candidate] = reason
    if name != "auto":
        raise RuntimeError(f"backend {name!r} cannot run: {reasons[name]}")
    _warn_once("; ".join(reasons.values()))
    return "reference"


def _warn_once(reason: str) -> None:
    if reason in _warned:
        return
    _warned.add(reason)
    warn_user(f"metakern uses its slow reference implementation: {reason}", FallbackWarning)


def empty_cache() -> None:
    """Free the CPU kernels' cache of memory for large results.

    It holds up to 1 GiB; the environment variable ``METAKERN_CPU_CACHE_MB`` sets another limit, 0 turns it off.

    Example:
        >>> metakern.empty_cache()
    """
    if _C is not None:
        _C.empty_cache()


def _triton_version() -> str:
    try:
        return importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        return ""


def build_info() -> dict[str, Any]:
    """Facts about this installation: versions, compiler, instruction sets, CUDA architectures.

    Example:
        >>> sorted(metakern.build_info())[:3]
        ['backend', 'built_with_torch', 'compiled']
    """
    facts: dict[str, Any] = {
        "metakern": __version__,
        "torch": torch.__version__,
        "cpu": cpu_model(),
        "compiled": is_compiled(),
    }
    if _C is None:
        return facts | {"backend": _override, "reason": _missing}
    return facts | {
        "built_with_torch": _C.torch_version,
        "compiler": _C.compiler,
        "cpu_capability": _C.cpu_capability(),
        "cpu_capabilities": _C.available_cpu_capabilities(),
        "nvcc": _C.nvcc,
        "cuda_architectures": _architecture_list(),
        "triton": _triton_version(),
        "backend": _override,
    }
