"""Which implementation serves a call.

``auto`` (the default) takes the fastest that works here and says once, as a :class:`FallbackWarning`, when that is the
plain PyTorch reference. A backend that is asked for by name either runs or raises. The environment variable
``METAKERN_BACKEND``, read when the package is imported, replaces ``auto``.
"""

from __future__ import annotations

import os
import warnings
from typing import Any

import torch

from metakern._machine import cpu_model
from metakern._version import __version__

#: Names that ``backend=`` takes.
BACKENDS = ("auto", "cpp", "reference")

_C: Any
try:
    from metakern import _C  # type: ignore[attr-defined,no-redef]

    _missing = ""
except (ImportError, RuntimeError) as error:  # the package must import without its kernels
    _C = None
    _missing = f"the compiled kernels could not be loaded ({error})"
else:
    _C.cpu_capability()  # ValueError for a METAKERN_CPU_CAPABILITY that is not available: it was asked for by name

_override = os.environ.get("METAKERN_BACKEND", "") or "auto"
if _override not in BACKENDS:
    raise ValueError(f"METAKERN_BACKEND must be one of {', '.join(BACKENDS)}, got {_override!r}")

_warned: set[str] = set()


class FallbackWarning(UserWarning):
    """The plain PyTorch reference serves a call, because no kernel can."""


def is_compiled() -> bool:
    """Whether the compiled kernels were found and loaded."""
    return _C is not None


def _why_no_kernel(device: torch.device, unserved: dict[str, str]) -> str:
    """Empty when the C++ kernels can serve this device, the reason otherwise."""
    if _C is None:
        return _missing + "; reinstall metakern with a C++ compiler at hand"
    if device.type != "cpu":
        return f"the compiled kernels serve tensors on the CPU, not on {device.type}"
    return unserved.get("cpp", "")


def check_backend(backend: str | None) -> None:
    """Raise ValueError unless ``backend`` is None or one of :data:`BACKENDS`."""
    if backend is not None and backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, got {backend!r}")


def resolve(backend: str | None, device: torch.device, unserved: dict[str, str] | None = None) -> str:
    """The backend that serves a call on ``device``: "cpp" or "reference".

    ``unserved`` maps backends that do not serve this call to the reason.

    Raises:
        ValueError: for a name that is not one of :data:`BACKENDS`
        RuntimeError: for a backend that was asked for by name and cannot run here
    """
    name = _override if backend in (None, "auto") else backend
    if name == "reference":
        return name
    check_backend(name)
    if unserved is None and _C is not None and device.type == "cpu":
        return "cpp"
    reason = _why_no_kernel(device, unserved or {})
    if name == "cpp":
        raise RuntimeError(f"backend 'cpp' cannot run: {reason}")
    _warn_once(reason)
    return "reference"


def _warn_once(reason: str) -> None:
    if reason not in _warned:
        _warned.add(reason)
        warnings.warn(f"metakern uses its slow reference implementation: {reason}", FallbackWarning, stacklevel=4)


def empty_cache() -> None:
    """Free the memory that the CPU kernels keep for their next large results.

    They keep up to 1 GiB of it; the environment variable ``METAKERN_CPU_CACHE_MB`` sets another limit, 0 for none.
    """
    if _C is not None:
        _C.empty_cache()


def build_info() -> dict[str, Any]:
    """What this installation can run: versions, compiler, instruction sets, CUDA architectures."""
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
        "cuda_architectures": _C.cuda_architectures,
        "backend": _override,
    }
