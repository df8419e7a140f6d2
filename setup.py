"""Builds metakern._C: the CPU kernels, once per instruction set, and their registration with torch.

Everything else about the package stands in pyproject.toml.
"""

from __future__ import annotations

import os
import platform
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import pybind11
import torch
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from torch.utils import cpp_extension

ROOT = Path(__file__).parent
IS_X86 = platform.machine().lower() in ("x86_64", "amd64")

# Instruction sets that every csrc/cpu/<op>.cpp is compiled for; the one in use is picked when the library loads.
CAPABILITY_FLAGS: dict[str, list[str]] = {"baseline": []}
if IS_X86:
    CAPABILITY_FLAGS["avx2"] = ["-mavx2", "-mfma"]
    # GCC before 13 takes its own AVX-512 headers for uninitialized (GCC bug 105593); Clang knows both options too.
    quiet = ["-Wno-uninitialized", "-Wno-maybe-uninitialized", "-Wno-unknown-warning-option"]
    CAPABILITY_FLAGS["avx512"] = [*quiet, "-mavx512f", "-mavx512dq", "-mavx512bw", "-mavx512vl", "-mfma"]

KERNELS = ["csrc/cpu/lstm_step.cpp"]
SOURCES = ["csrc/ops.cpp", "csrc/cpu/bindings.cpp", "csrc/cpu/capability.cpp", "csrc/cpu/result_cache.cpp"]

# The oldest torch whose stable interface is used: a build against a newer torch still runs on this one.
OLDEST_TORCH = "0x020b000000000000"


def compiler_version(compiler: list[str]) -> str:
    """First line of the compiler's own version report."""
    result = subprocess.run([*compiler, "--version"], capture_output=True, text=True, check=True)
    return result.stdout.splitlines()[0]


class Job(NamedTuple):
    """One run of the compiler."""

    source: str
    output_dir: str
    macros: list[tuple[str, str]]
    system_includes: list[str]  # torch's and pybind11's headers: their warnings are not ours
    flags: list[str]


class BuildExtension(build_ext):
    """Compiles the kernels once per instruction set and links everything into one library."""

    def build_extension(self, ext: Extension) -> None:
        """Compile side by side, then let setuptools link."""
        self.force = True  # setuptools sees neither flags nor torch change
        sanitizers = os.environ.get("METAKERN_SANITIZE", "")  # e.g. "address,undefined"
        extra = [f"-fsanitize={sanitizers}", "-fno-omit-frame-pointer", "-g"] if sanitizers else []
        flags = ["-std=c++17", "-O1" if sanitizers else "-O3", "-Wall", "-Wextra", *extra]
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            compiled = pool.map(self.compile_one, self.jobs(flags))
        ext.extra_objects = [path for paths in compiled for path in paths]
        ext.extra_link_args = extra[:1]
        ext.library_dirs = cpp_extension.library_paths()
        ext.libraries = ["torch", "torch_cpu", "c10"]
        super().build_extension(ext)

    def jobs(self, flags: list[str]) -> list[Job]:
        """Every kernel for every instruction set, then the rest."""
        macros = [
            ("TORCH_TARGET_VERSION", OLDEST_TORCH),
            ("METAKERN_COMPILER", f'"{compiler_version(self.compiler.compiler_so)}"'),
            ("METAKERN_TORCH_VERSION", f'"{torch.__version__}"'),
        ]
        if IS_X86:
            macros.append(("METAKERN_X86_CAPABILITIES", "1"))
        includes = [pybind11.get_include(), *cpp_extension.include_paths()]
        kernels = [
            Job(kernel, f"{self.build_temp}/{name}", [("MK_CAPABILITY", name)], [], [*flags, *capability_flags])
            for name, capability_flags in CAPABILITY_FLAGS.items()
            for kernel in KERNELS
        ]
        return kernels + [Job(source, self.build_temp, macros, includes, flags) for source in SOURCES]

    def compile_one(self, job: Job) -> list[str]:
        """Object files of a job."""
        flags = [*job.flags, "-fvisibility=hidden", *(f"-isystem{path}" for path in job.system_includes)]
        objects: list[str] = self.compiler.compile(
            [job.source], job.output_dir, job.macros, self.compiler.include_dirs, extra_postargs=flags
        )
        return objects


setup(
    ext_modules=[
        Extension("metakern._C", sources=[], language="c++", depends=[str(p) for p in ROOT.glob("csrc/**/*")])
    ],
    cmdclass={"build_ext": BuildExtension},
)
