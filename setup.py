"""Builds metakern._C: CPU kernels, once per instruction set, CUDA kernels where nvcc is found, and their registration.

Environment: METAKERN_CUDA=0 leaves CUDA out, =1 demands it; CUDA_HOME says where it is; TORCH_CUDA_ARCH_LIST which
architectures ("8.0;9.0;10.0+PTX"); METAKERN_SANITIZE builds with sanitizers. Everything else about the package stands
in pyproject.toml.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
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

# With the options that a file asks for: inner_update gives PyTorch's bits on every instruction set.
KERNELS: dict[str, list[str]] = {
    "csrc/cpu/lstm_step.cpp": [],
    "csrc/cpu/inner_update.cpp": ["-ffp-contract=off"],
    "csrc/cpu/mlp_inner_loop.cpp": [],
}
SOURCES = [
    "csrc/ops.cpp",
    "csrc/cpu/bindings.cpp",
    "csrc/cpu/inner_update_bindings.cpp",
    "csrc/cpu/mlp_inner_loop_bindings.cpp",
    "csrc/cpu/capability.cpp",
    "csrc/cpu/result_cache.cpp",
]

CUDA_KERNELS = ["csrc/cuda/lstm_step.cu", "csrc/cuda/inner_update.cu", "csrc/cuda/mlp_inner_loop.cu"]
CUDA_SOURCES = [
    "csrc/cuda/bindings.cpp",
    "csrc/cuda/inner_update_bindings.cpp",
    "csrc/cuda/mlp_inner_loop_bindings.cpp",
]
DEFAULT_CUDA_ARCHITECTURES = "8.0;9.0;10.0+PTX"
ARCHITECTURE = re.compile(r"(\d+)\.(\d[af]?)(\+PTX)?")

# The oldest torch whose stable interface is used: a build against a newer torch still runs on this one.
OLDEST_TORCH = "0x020b000000000000"


def compiler_version(compiler: list[str]) -> str:
    """The line of a compiler's version report that names the version."""
    result = subprocess.run([*compiler, "--version"], capture_output=True, text=True, check=True)
    lines = result.stdout.splitlines()
    return next((line for line in lines if "release" in line), lines[0])


class Cuda(NamedTuple):
    """A CUDA toolkit and the architectures to compile for."""

    nvcc: str
    home: Path
    architectures: str

    @classmethod
    def find(cls) -> Cuda | None:
        """The toolkit of CUDA_HOME or of the nvcc on PATH; whether a GPU answers here does not matter."""
        wanted = os.environ.get("METAKERN_CUDA", "")
        if wanted not in ("", "0", "1"):
            raise SystemExit(f"METAKERN_CUDA must be 0, 1 or unset, got {wanted!r}")
        home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
        nvcc = shutil.which("nvcc", path=f"{home}/bin" if home else None)
        if wanted == "0" or nvcc is None:
            if wanted == "1":
                raise SystemExit(f"METAKERN_CUDA=1, but there is no nvcc in {f'{home}/bin' if home else 'PATH'}")
            return None
        # Where nvcc itself thinks that it lives: the one on PATH may be a script or a link.
        architectures = cls.served(os.environ.get("TORCH_CUDA_ARCH_LIST") or DEFAULT_CUDA_ARCHITECTURES)
        report = subprocess.run([nvcc, "--dryrun", "-x", "cu", "-c", os.devnull], capture_output=True, text=True)
        top = re.search(r"^#\$ TOP=(.*)$", report.stderr, re.MULTILINE)
        if report.returncode or top is None:
            raise SystemExit(f"{nvcc} does not work (METAKERN_CUDA=0 builds without it):\n{report.stderr}")
        return cls(nvcc, Path(top[1].strip()).resolve(), architectures)

    @staticmethod
    def served(architectures: str) -> str:
        """The entries of a TORCH_CUDA_ARCH_LIST that the kernels are written for: 8.0 and newer."""
        kept = []
        for name in architectures.replace(";", " ").split():
            match = ARCHITECTURE.fullmatch(name)
            if match is None:
                raise SystemExit(f"TORCH_CUDA_ARCH_LIST must hold entries like 9.0 or 10.0+PTX, got {name!r}")
            if int(match[1]) >= 8:
                kept.append(name)
            else:
                print(f"no CUDA kernels for {name}: they need 8.0 or newer")
        if not kept:
            raise SystemExit(f"TORCH_CUDA_ARCH_LIST must hold 8.0 or newer for METAKERN_CUDA, got {architectures!r}")
        return ";".join(kept)

    def targets(self) -> list[str]:
        """The architecture list as nvcc's options."""
        flags = []
        for name in self.architectures.split(";"):
            match = ARCHITECTURE.fullmatch(name)
            assert match is not None
            number = match[1] + match[2]
            flags.append(f"-gencode=arch=compute_{number},code=sm_{number}")
            if match[3]:
                flags.append(f"-gencode=arch=compute_{number},code=compute_{number}")
        return flags

    def compile(self, kernel: str, output_dir: str) -> list[str]:
        """Object file of one .cu file."""
        output = Path(output_dir, kernel).with_suffix(".o")
        output.parent.mkdir(parents=True, exist_ok=True)
        host = "-Xcompiler=-fPIC,-fvisibility=hidden,-Wall,-Wextra"
        command = [self.nvcc, "-c", "-std=c++17", "-O3", host, *self.targets(), kernel, "-o", str(output)]
        print(" ".join(command))
        subprocess.run(command, check=True)
        return [str(output)]


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
        flags = ["-std=c++17", "-O0" if sanitizers else "-O3", "-Wall", "-Wextra", *extra]
        cuda = Cuda.find()
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            kernels = [pool.submit(cuda.compile, kernel, self.build_temp) for kernel in CUDA_KERNELS] if cuda else []
            compiled = list(pool.map(self.compile_one, self.jobs(flags, cuda)))
            compiled += [kernel.result() for kernel in kernels]
        ext.extra_objects = [path for paths in compiled for path in paths]
        # A torch with CUDA brings its CUDA library in as a need of libtorch, which must not be dropped as unused.
        needed = ["-Wl,--push-state,--no-as-needed", "-ltorch", "-Wl,--pop-state"]
        ext.extra_link_args = [*extra[:1], *needed]
        ext.library_dirs = cpp_extension.library_paths()
        ext.libraries = ["torch_cpu", "c10"]
        if cuda:  # the static runtime: the library loads where there is no CUDA
            ext.library_dirs += [str(cuda.home / "lib64"), str(cuda.home / "lib")]
            ext.libraries += ["cudart_static", "dl", "rt", "pthread"]
        super().build_extension(ext)

    def jobs(self, flags: list[str], cuda: Cuda | None) -> list[Job]:
        """Every CPU kernel for every instruction set, then the rest."""
        macros = [
            ("TORCH_TARGET_VERSION", OLDEST_TORCH),
            ("METAKERN_COMPILER", f'"{compiler_version(self.compiler.compiler_so)}"'),
            ("METAKERN_TORCH_VERSION", f'"{torch.__version__}"'),
        ]
        if IS_X86:
            macros.append(("METAKERN_X86_CAPABILITIES", "1"))
        includes = [pybind11.get_include(), *cpp_extension.include_paths()]
        sources = list(SOURCES)
        if cuda:
            sources += CUDA_SOURCES
            macros += [
                ("USE_CUDA", "1"),  # torch's own switch for its CUDA shims
                ("METAKERN_CUDA_ARCHITECTURES", f'"{cuda.architectures}"'),
                ("METAKERN_NVCC", f'"{compiler_version([cuda.nvcc])}"'),
            ]
            includes.append(str(cuda.home / "include"))
        kernels = [
            Job(kernel, f"{self.build_temp}/{name}", [("MK_CAPABILITY", name)], [], [*flags, *capability_flags, *own])
            for name, capability_flags in CAPABILITY_FLAGS.items()
            for kernel, own in KERNELS.items()
        ]
        return kernels + [Job(source, self.build_temp, macros, includes, flags) for source in sources]

    def compile_one(self, job: Job) -> list[str]:
        """Object files of a job."""
        flags = [*job.flags, "-fvisibility=hidden", *(f"-isystem{path}" for path in job.system_includes)]
        objects: list[str] = self.compiler.compile(
            [job.source], job.output_dir, job.macros, self.compiler.include_dirs, extra_postargs=flags
        )
        return objects


if __name__ == "__main__":  # so it is in every build; the tests import what stands above
    setup(
        ext_modules=[
            Extension("metakern._C", sources=[], language="c++", depends=[str(p) for p in ROOT.glob("csrc/**/*")])
        ],
        cmdclass={"build_ext": BuildExtension},
    )
