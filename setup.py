"""Builds metakern._C from csrc: CPU kernels, once per instruction set, and CUDA kernels.

The CUDA kernels take most of the time. They are compiled if nvcc is found and a GPU responds, or if
TORCH_CUDA_ARCH_LIST is set, as for a build for another machine. METAKERN_CUDA=1 always requires them, METAKERN_CUDA=0
leaves them out.

Environment: METAKERN_BUILD=0 installs the package without kernels and needs no compiler; METAKERN_CUDA as above;
CUDA_HOME is the CUDA toolkit; TORCH_CUDA_ARCH_LIST lists the architectures ("8.0;9.0;10.0+PTX"); METAKERN_SANITIZE
builds with sanitizers. Everything else about the package is in pyproject.toml.

A rebuild compiles the files that changed: see :class:`Job`.
"""

from __future__ import annotations

import importlib
import json
import logging
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent
IS_X86 = platform.machine().lower() in ("x86_64", "amd64")

DEFAULT_CUDA_ARCHITECTURES = "8.0;9.0;10.0+PTX"
ARCHITECTURE = re.compile(r"(\d+)\.(\d[af]?)(\+PTX)?")

# The oldest supported torch: a build against a newer one uses only the stable interface of this version.
OLDEST_TORCH = "0x020b000000000000"

# The library that records calls as nodes of C++ in autograd's graph. It works with the torch that it was built with.
AUTOGRAD = "metakern._autograd"

# Object files are kept between builds; the build folder of an editable install is temporary.
OBJECTS = Path("build", "objects", str(sys.implementation.cache_tag))

WITHOUT_KERNELS = "METAKERN_BUILD=0 installs metakern without its kernels, as plain PyTorch"


def wants_kernels(system: str) -> bool:
    """Whether METAKERN_BUILD and the platform (sys.platform) allow building the kernels."""
    wanted = os.environ.get("METAKERN_BUILD", "")
    if wanted not in ("", "0", "1"):
        raise SystemExit(f"METAKERN_BUILD must be 0, 1 or unset, got {wanted!r}")
    if wanted == "0":
        return False
    if system == "win32":
        reason = "the kernels need GCC or Clang, whose vector types MSVC does not know"
        if wanted == "1":
            raise SystemExit(f"METAKERN_BUILD=1, but {reason}")
        print(f"metakern is installed without its kernels, as plain PyTorch: {reason}")
        return False
    return True


def needed(name: str) -> ModuleType:
    """Import a module that the build needs; exits with one line if its package is missing."""
    try:
        return importlib.import_module(name)
    except (ImportError, OSError) as error:
        package = name.partition(".")[0]
        raise SystemExit(
            f"{package} is needed to build metakern's kernels, and cannot be imported ({error}): pip install "
            f"{package}; {WITHOUT_KERNELS}"
        ) from None


def compiler_version(compiler: list[str]) -> str:
    """The line with the version in a compiler's version report."""
    try:
        result = subprocess.run([*compiler, "--version"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise SystemExit(
            f"the C++ compiler of metakern's kernels does not run ({error}): install one (Debian: apt install g++) or "
            f"name it in CXX; {WITHOUT_KERNELS}"
        ) from None
    lines = result.stdout.splitlines()
    return next((line for line in lines if "release" in line), lines[0])


def instruction_sets(table: Path = ROOT / "csrc" / "core" / "instruction_sets.h") -> dict[str, list[str]]:
    """Instruction sets of the CPU kernels, with the compiler options for each.

    They are read from a C++ header, which documents the columns. The compiled library picks one from the same rows.
    """
    text = re.sub(r"\\?\n\s*", "", table.read_text(encoding="utf-8"))
    found = {}
    for x86, name, condition, options in re.findall(r'(MK_ON_X86\()?\bX\((\w+), *([^,]+), *"([^"]*)", __VA_', text):
        if IS_X86 or not x86:
            features = re.findall(r'MK_HAS\("(\w+)"\)', condition)
            found[name] = [*options.split(), *(f"-m{feature}" for feature in features)]
    return found


class Sources(NamedTuple):
    """Source files as paths below ROOT: all in the folders of csrc, classified by name."""

    cpu_kernels: list[str]  # <folder>/cpu_kernel*.cpp, once per instruction set
    once: list[str]  # every other <folder>/*.cpp
    autograd: list[str]  # <folder>/autograd*.cpp, the library of its own that uses torch's own C++ interface
    cuda_kernels: list[str]  # <folder>/*.cu
    cuda: list[str]  # <folder>/cuda*.cpp, only with CUDA

    @classmethod
    def find(cls, root: Path = ROOT) -> Sources:
        """Find the sources in csrc beside setup.py, or below another root."""
        cpp = sorted(path.relative_to(root).as_posix() for path in root.glob("csrc/*/*.cpp"))
        kernels = [name for name in cpp if Path(name).name.startswith("cpu_kernel")]
        cuda = [name for name in cpp if Path(name).name.startswith("cuda")]
        autograd = [name for name in cpp if Path(name).name.startswith("autograd")]
        once = [name for name in cpp if name not in (*kernels, *cuda, *autograd)]
        cuda_kernels = sorted(path.relative_to(root).as_posix() for path in root.glob("csrc/*/*.cu"))
        return cls(kernels, once, autograd, cuda_kernels, cuda)


def own_options(source: Path) -> list[str]:
    """Compiler options in the first line of a C++ file: ``// compile with: -ffp-contract=off``."""
    with source.open(encoding="utf-8") as file:
        match = re.match(r"// compile with: (.+)", file.readline())
    return match[1].split() if match else []


def gpu_answers() -> bool:
    """Whether nvidia-smi lists a GPU; CUDA is not initialised in this process."""
    try:
        report = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=60, check=False)
    except OSError:  # some containers with a GPU lack the tool
        return Path("/dev/nvidia0").exists()
    except subprocess.TimeoutExpired:
        return False
    return report.returncode == 0 and "GPU " in report.stdout


class Cuda(NamedTuple):
    """A CUDA toolkit and the architectures to compile for."""

    nvcc: str
    home: Path
    architectures: str

    @classmethod
    def find(cls) -> Cuda | None:
        """Find the toolkit of CUDA_HOME or of the nvcc on PATH; None if the CUDA kernels are left out.

        Prints a line if nvcc is found but no GPU.
        """
        wanted = os.environ.get("METAKERN_CUDA", "")
        if wanted not in ("", "0", "1"):
            raise SystemExit(f"METAKERN_CUDA must be 0, 1 or unset, got {wanted!r}")
        home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
        nvcc = shutil.which("nvcc", path=f"{home}/bin" if home else None)
        if wanted == "0" or nvcc is None:
            if wanted == "1":
                raise SystemExit(f"METAKERN_CUDA=1, but there is no nvcc in {f'{home}/bin' if home else 'PATH'}")
            return None
        listed = os.environ.get("TORCH_CUDA_ARCH_LIST")
        if wanted != "1" and not listed and not gpu_answers():
            print("no GPU answers here: metakern is built without its CUDA kernels (METAKERN_CUDA=1 compiles them)")
            return None
        # Ask nvcc for its location: the one on PATH may be a script or a link.
        architectures = cls.served(listed or DEFAULT_CUDA_ARCHITECTURES)
        report = subprocess.run([nvcc, "--dryrun", "-x", "cu", "-c", os.devnull], capture_output=True, text=True)
        top = re.search(r"^#\$ TOP=(.*)$", report.stderr, re.MULTILINE)
        if report.returncode or top is None:
            raise SystemExit(f"{nvcc} does not work (METAKERN_CUDA=0 builds without it):\n{report.stderr}")
        return cls(nvcc, Path(top[1].strip()).resolve(), architectures)

    @staticmethod
    def served(architectures: str) -> str:
        """The entries of a TORCH_CUDA_ARCH_LIST that the kernels support: 8.0 and newer."""
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

    def command(self, kernel: str) -> list[str]:
        """The command line that compiles one .cu file."""
        host = "-Xcompiler=-fPIC,-fvisibility=hidden,-Wall,-Wextra"
        return [self.nvcc, "-std=c++17", "-O3", host, *self.targets(), "-c", kernel]


def build_facts(compiler: str, torch: str, cuda: Cuda | None) -> dict[str, str]:
    """Build facts for metakern.build_info(), as macros for csrc/core/module.cpp."""
    facts = {"METAKERN_COMPILER": compiler, "METAKERN_TORCH_VERSION": torch}
    if cuda:
        facts["METAKERN_CUDA_ARCHITECTURES"] = cuda.architectures
        facts["METAKERN_NVCC"] = compiler_version([cuda.nvcc])
    return facts


class Flags(NamedTuple):
    """Options of GCC and Clang for compiling and linking."""

    compile: list[str]
    link: list[str]

    @classmethod
    def of(cls, system: str, sanitizers: str) -> Flags:
        """Options for a platform (sys.platform) and sanitizers like "address,undefined"."""
        compile_ = ["-std=c++17", "-fvisibility=hidden", "-Wall", "-Wextra"]
        is_mac = system == "darwin"
        # GNU ld must not drop libtorch as unused: in a torch with CUDA it pulls in torch's CUDA library.
        # Apple's linker lacks these options, and drops no library.
        link = ["-ltorch"] if is_mac else ["-Wl,--push-state,--no-as-needed", "-ltorch", "-Wl,--pop-state"]
        if sanitizers:  # their reports need the symbols
            sanitize = f"-fsanitize={sanitizers}"
            return cls([*compile_, "-O0", "-g", "-fno-omit-frame-pointer", sanitize], [*link, sanitize])
        # Overrides debug information in Python's own options: the last option wins.
        strip = ["-Wl,-S", "-Wl,-x"] if is_mac else ["-Wl,-s"]
        return cls([*compile_, "-O3", "-g0"], [*link, *strip])


def read_dependencies(report: Path) -> list[str]:
    """The files that a compiler's dependency report (-MMD) names."""
    _, _, names = report.read_text().replace("\\\n", " ").partition(": ")
    return [re.sub(r"\\(.)", r"\1", name).replace("$$", "$") for name in re.findall(r"(?:\\.|\S)+", names)]


class Job(NamedTuple):
    """One compiler run, skipped if its object file is current.

    An object file is current if command and versions are the same and no source or header has been modified since. A
    .json file beside it records all three.
    """

    command: list[str]  # compiler, options and source
    output: Path
    versions: dict[str, str]  # of the compiler and of the packages whose headers are used

    def run(self) -> bool:
        """Compile unless the object file is current; returns whether it compiled."""
        if self.is_current():
            return False
        stamp, report = self.output.with_suffix(".json"), self.output.with_suffix(".d")
        self.output.parent.mkdir(parents=True, exist_ok=True)
        stamp.unlink(missing_ok=True)
        command = [*self.command, "-MMD", "-MF", str(report), "-o", str(self.output)]
        logging.info(" ".join(command))
        start = time.time_ns()
        try:
            status = subprocess.run(command, check=False).returncode
        except OSError as error:
            raise SystemExit(f"{self.command[0]} does not run: {error}; {WITHOUT_KERNELS}") from None
        if status:
            raise SystemExit(f"{self.command[-1]} was not compiled: see the compiler's messages; {WITHOUT_KERNELS}")
        times = {name: Path(name).stat().st_mtime_ns for name in read_dependencies(report)}
        if max(times.values()) < start:  # else a file changed while it was read
            stamp.write_text(json.dumps(self.record() | {"times": times}))
        return True

    def is_current(self) -> bool:
        """Whether the object file is up to date."""
        try:
            made = json.loads(self.output.with_suffix(".json").read_text())
            now = {name: Path(name).stat().st_mtime_ns for name in made["times"]}
        except (OSError, ValueError, KeyError):
            return False
        return self.output.exists() and bool(made == self.record() | {"times": now})

    def record(self) -> dict[str, Any]:
        """The recorded facts to compare, without file times."""
        return {"command": self.command, "versions": self.versions}


class BuildExtension(build_ext):
    """Compiles the kernels once per instruction set and links two libraries: the kernels, and :data:`AUTOGRAD`."""

    @cached_property
    def cuda(self) -> Cuda | None:
        """The toolkit, looked for once."""
        return Cuda.find()

    def build_extension(self, ext: Extension) -> None:
        """Compile both libraries' files in parallel, then let setuptools link this one."""
        self.force = True  # setuptools notices no changed options or object files
        cpp_extension = needed("torch.utils.cpp_extension")
        flags = Flags.of(sys.platform, os.environ.get("METAKERN_SANITIZE", ""))
        cuda = self.cuda if ext.name != AUTOGRAD else None
        jobs = self.jobs(flags.compile, self.cuda)
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            runs = [pool.submit(job.run) for job in jobs]
            try:
                compiled = sum(run.result() for run in runs)
            finally:  # after an error: cancel jobs not yet started
                pool.shutdown(wait=False, cancel_futures=True)
        logging.info(f"{compiled} of {len(jobs)} files compiled, the others are current")
        of_autograd = {str(OBJECTS / f"{name}.o") for name in Sources.find().autograd}
        objects = [str(job.output) for job in jobs]
        ext.extra_objects = [name for name in objects if (name in of_autograd) == (ext.name == AUTOGRAD)]
        ext.extra_link_args = flags.link
        ext.library_dirs = cpp_extension.library_paths()
        ext.libraries = ["torch_cpu", "c10", *(["torch_python"] if ext.name == AUTOGRAD else [])]
        if cuda:  # static runtime, so that the library loads without CUDA
            ext.library_dirs += [str(cuda.home / "lib64"), str(cuda.home / "lib")]
            ext.libraries += ["cudart_static", "dl", "rt", "pthread"]
        super().build_extension(ext)

    def jobs(self, flags: list[str], cuda: Cuda | None) -> list[Job]:
        """The CUDA kernels, which take longest, every CPU kernel for every instruction set, then the rest."""
        compiler = self.compiler.compiler_so_cxx
        version, sources = compiler_version(compiler), Sources.find()
        jobs = []
        if cuda:
            versions = {"nvcc": compiler_version([cuda.nvcc])}
            jobs += [Job(cuda.command(name), OBJECTS / f"{name}.o", versions) for name in sources.cuda_kernels]
        for name, capability_flags in instruction_sets().items():
            for kernel in sources.cpu_kernels:
                own = own_options(ROOT / kernel)
                command = [*compiler, f"-DMK_CAPABILITY={name}", *flags, *capability_flags, *own, "-c", kernel]
                jobs.append(Job(command, OBJECTS / name / f"{kernel}.o", {"compiler": version}))
        torch, pybind11 = needed("torch"), needed("pybind11")
        # Headers of other packages are system headers: their warnings are not ours.
        includes = [pybind11.get_include(), *needed("torch.utils.cpp_extension").include_paths()]
        shared = [f"-DTORCH_TARGET_VERSION={OLDEST_TORCH}", *(f"-I{path}" for path in self.compiler.include_dirs)]
        shared += [f"-isystem{path}" for path in includes]
        facts = build_facts(version, torch.__version__, cuda)
        versions = {"compiler": version, "torch": torch.__version__, "pybind11": pybind11.__version__}
        for source in sources.once:
            # Only the facts that the file mentions, so that others cause no recompilation.
            text = (ROOT / source).read_text(encoding="utf-8")
            own = [f'-D{name}="{value}"' for name, value in facts.items() if name in text]
            own += own_options(ROOT / source)
            jobs.append(Job([*compiler, *shared, *own, *flags, "-c", source], OBJECTS / f"{source}.o", versions))
        # torch's own interface, with the pybind11 that torch comes with.
        own_interface = [f"-I{path}" for path in self.compiler.include_dirs] + [f"-isystem{p}" for p in includes[1:]]
        for source in sources.autograd:
            jobs.append(Job([*compiler, *own_interface, *flags, "-c", source], OBJECTS / f"{source}.o", versions))
        if cuda:
            own = [f'-DMETAKERN_CUDA_ARCHITECTURES="{cuda.architectures}"', f"-isystem{cuda.home / 'include'}"]
            own.append("-DUSE_CUDA=1")  # torch's own switch for its CUDA shims
            command = [*compiler, *shared, *own, *flags, "-c"]
            jobs += [Job([*command, source], OBJECTS / f"{source}.o", versions) for source in sources.cuda]
        return jobs


if __name__ == "__main__":  # true in every build; tests import the code above
    extensions = []
    if wants_kernels(sys.platform):
        if sys.platform == "darwin":  # universal interpreters request two architectures; build for one
            os.environ.setdefault("ARCHFLAGS", f"-arch {platform.machine()}")
        headers = [str(path) for path in ROOT.glob("csrc/**/*")]
        extensions = [
            Extension(name, sources=[], language="c++", depends=headers) for name in ("metakern._C", AUTOGRAD)
        ]
    setup(ext_modules=extensions, cmdclass={"build_ext": BuildExtension})
