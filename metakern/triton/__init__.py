"""The operators as Triton kernels, one file each; importing it needs the package triton."""

try:
    import triton  # noqa: F401
except ImportError as error:
    raise ImportError(
        f"the Triton kernels need the package triton, 3.6 or newer: pip install triton ({error})"
    ) from error
