"""Compiles every CUDA kernel and records its resources: registers, shared memory, stack frame, spills.

python -m bench.ptxas [--output bench/results/ptxas.json]

No GPU is needed. Exits with status 1 if a kernel spills registers or has a stack frame; general kernels, which serve
any number of hidden units, are exempt.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import typer

ROOT = Path(__file__).parent.parent
ARCHITECTURES = ("sm_80", "sm_90", "sm_100")
FLAGS = ("-std=c++17", "-O3", "-cubin", "-Xptxas", "-v")


@dataclass(frozen=True)
class Kernel:
    """One kernel on one architecture; sizes in bytes, registers of one thread."""

    name: str
    architecture: str
    registers: int
    static_shared_bytes: int
    stack_bytes: int
    spill_store_bytes: int
    spill_load_bytes: int

    @property
    def is_general(self) -> bool:
        """Whether it serves any number of hidden units; its last template argument is then 0."""
        return re.search(r", 0>+$", self.name) is not None

    @property
    def leaves_registers(self) -> bool:
        """Whether it spills registers or has a stack frame."""
        return bool(self.stack_bytes or self.spill_store_bytes or self.spill_load_bytes)


def parse(report: str) -> list[Kernel]:
    """The kernels of a report of ``nvcc -Xptxas -v``, mangled or demangled.

    Raises:
        ValueError: for a kernel with an incomplete report
    """
    kernels = []
    for block in report.split("Compiling entry function '")[1:]:
        head = re.match(r"(.*?)' for '(\w+)'", block)
        frame = re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", block)
        registers = re.search(r"Used (\d+) registers", block)
        if head is None or frame is None or registers is None:
            raise ValueError(f"no complete report of a kernel: {block.splitlines()[0]!r}")
        shared = re.search(r"(\d+) bytes smem", block)
        sizes = (registers[1], shared[1] if shared else 0, *frame.groups())
        kernels.append(Kernel(short_name(head[1]), head[2], *(int(size) for size in sizes)))
    return kernels


def short_name(demangled: str) -> str:
    """A kernel's name and template arguments, without return type, namespaces and parameters."""
    name = demangled.removeprefix("void ").replace("metakern::cuda::", "").replace("> >", ">>")
    return re.sub(r"\(.*\)$", "", name)


def find_nvcc() -> str:
    """The compiler of CUDA_HOME or the one on PATH.

    Raises:
        FileNotFoundError: if there is none
    """
    home = os.environ.get("CUDA_HOME")
    nvcc = shutil.which("nvcc", path=f"{home}/bin" if home else None)
    if nvcc is None:
        raise FileNotFoundError(f"there is no nvcc in {f'{home}/bin' if home else 'PATH'}")
    return nvcc


def demangle(text: str) -> str:
    """Demangle every C++ name in a text.

    Raises:
        FileNotFoundError: if the demangling tool is missing
    """
    tool = shutil.which("c++filt") or shutil.which("cu++filt")
    if tool is None:
        raise FileNotFoundError("neither c++filt (binutils) nor cu++filt (CUDA) is on PATH")
    return subprocess.run([tool], input=text, capture_output=True, text=True, check=True).stdout


def compile_kernels(nvcc: str, source: Path, architecture: str) -> list[Kernel]:
    """The compiler's report for one source file on one architecture.

    Raises:
        RuntimeError: if it does not compile
    """
    with tempfile.TemporaryDirectory() as folder:
        output = str(Path(folder, "kernels.cubin"))
        command = [nvcc, *FLAGS, f"-arch={architecture}", str(source.relative_to(ROOT)), "-o", output]
        run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if run.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{run.stdout}{run.stderr}")
    return parse(demangle(run.stdout + run.stderr))


def nvcc_version(nvcc: str) -> str:
    """The line with the version in nvcc's version report."""
    report = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
    return next(line for line in report.splitlines() if "release" in line)


def table(kernels: list[Kernel]) -> str:
    """Table for the terminal: one line per kernel, one column per architecture."""
    names = list(dict.fromkeys(kernel.name for kernel in kernels))
    architectures = list(dict.fromkeys(kernel.architecture for kernel in kernels))
    found = {(kernel.name, kernel.architecture): kernel for kernel in kernels}
    width = max(map(len, names), default=0)
    lines = [f"{'registers (stack/spilled bytes)':{width}} " + "".join(f"{a:>16}" for a in architectures)]
    for name in names:
        cells = []
        for architecture in architectures:
            kernel = found[name, architecture]
            spilled = kernel.spill_store_bytes + kernel.spill_load_bytes
            extra = f" ({kernel.stack_bytes}/{spilled})" if kernel.leaves_registers else ""
            cells.append(f"{kernel.registers}{extra}")
        lines.append(f"{name:{width}} " + "".join(f"{cell:>16}" for cell in cells))
    return "\n".join(lines)


def faults(kernels: list[Kernel]) -> list[str]:
    """One line for each kernel with spills or a stack frame, except general ones."""
    return [
        f"{k.name} on {k.architecture}: {k.stack_bytes} bytes of stack frame, {k.spill_store_bytes} of spill stores, "
        f"{k.spill_load_bytes} of spill loads"
        for k in kernels
        if k.leaves_registers and not k.is_general
    ]


def main(
    output: Annotated[Path, typer.Option(help="where the table goes")] = ROOT / "bench" / "results" / "ptxas.json",
) -> None:
    """Compile for every architecture, write the table, fail on a spill."""
    nvcc, start = find_nvcc(), time.perf_counter()
    sources = sorted((ROOT / "csrc").glob("*/*.cu"))
    jobs = [(nvcc, source, architecture) for source in sources for architecture in ARCHITECTURES]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        kernels = [kernel for found in pool.map(lambda job: compile_kernels(*job), jobs) for kernel in found]
    results = {
        "command": f"python -m bench.ptxas: nvcc {' '.join(FLAGS)} -arch=ARCHITECTURE csrc/*/*.cu",
        "nvcc": nvcc_version(nvcc),
        "kernels": [asdict(kernel) for kernel in sorted(kernels, key=lambda k: (k.name, k.architecture))],
    }
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(results, indent=2) + "\n")
    print(table(kernels))
    print(f"{len(kernels)} kernels in {time.perf_counter() - start:.0f} s; {output}")
    found = faults(kernels)
    for fault in found:
        print(fault)
    raise typer.Exit(1 if found or not kernels else 0)


if __name__ == "__main__":
    typer.run(main)
