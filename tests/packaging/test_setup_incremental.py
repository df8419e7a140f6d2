"""Incremental builds of setup.py: only files whose sources, headers, options or compiler changed are recompiled."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

from tests.packaging.test_setup import load_setup

HAS_NVCC = shutil.which("nvcc") is not None


@pytest.fixture(scope="module")
def setup() -> ModuleType:
    return load_setup()


@pytest.fixture
def build(setup: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[str]]:
    """Builds two sources, one of which reads a header through another; gives the names of those compiled."""
    monkeypatch.chdir(tmp_path)
    folder = Path("a folder")  # compilers escape spaces in what they report
    folder.mkdir()
    (folder / "inner.h").write_text("inline int inner() { return 1; }\n")
    (folder / "outer.h").write_text('#include "inner.h"\n')
    (folder / "one.cpp").write_text('#include "outer.h"\nint one() { return inner(); }\n')
    (folder / "two.cpp").write_text("int two() { return 2; }\n")

    def run(*flags: str, version: str = "1") -> list[str]:
        names = ["one.cpp", "two.cpp"]
        jobs = [
            setup.Job(["g++", *flags, "-c", str(folder / name)], Path("out", f"{name}.o"), {"compiler": version})
            for name in names
        ]
        return [name for name, job in zip(names, jobs, strict=True) if job.run()]

    return run


def change(name: str, text: str = "// changed\n") -> None:
    path = Path("a folder", name)
    path.write_text(path.read_text() + text)


def test_only_what_changed_is_compiled(build: Callable[..., list[str]]) -> None:
    assert build() == ["one.cpp", "two.cpp"]
    assert build() == []
    change("two.cpp")
    assert build() == ["two.cpp"]
    change("one.cpp")
    assert build() == ["one.cpp"]
    assert build() == []


def test_headers_of_headers_count(build: Callable[..., list[str]]) -> None:
    build()
    change("inner.h")
    assert build() == ["one.cpp"]
    assert build() == []


def test_options_and_versions_count(build: Callable[..., list[str]]) -> None:
    build()
    assert build("-DX=1") == ["one.cpp", "two.cpp"]
    assert build("-DX=1") == []
    assert build("-DX=1", version="2") == ["one.cpp", "two.cpp"]
    assert build("-DX=1", version="2") == []


def test_an_older_file_put_back_counts(build: Callable[..., list[str]]) -> None:
    path = Path("a folder", "two.cpp")
    build()
    time = path.stat().st_mtime - 1000
    os.utime(path, (time, time))
    assert build() == ["two.cpp"]


@pytest.mark.parametrize("lost", ["two.cpp.o", "two.cpp.json"])
def test_what_was_lost_is_made_again(build: Callable[..., list[str]], lost: str) -> None:
    build()
    Path("out", lost).unlink()
    assert build() == ["two.cpp"]


def test_a_damaged_record_is_made_again(build: Callable[..., list[str]]) -> None:
    build()
    Path("out", "two.cpp.json").write_text("{")
    assert build() == ["two.cpp"]


def test_a_header_that_is_gone_counts(build: Callable[..., list[str]]) -> None:
    build()
    Path("a folder", "inner.h").rename("a folder/other.h")
    Path("a folder", "outer.h").write_text('#include "other.h"\n')
    assert build() == ["one.cpp"]


def test_a_file_that_did_not_compile_is_tried_again(
    build: Callable[..., list[str]], capfd: pytest.CaptureFixture[str]
) -> None:
    build()
    change("two.cpp", "no C++\n")
    for _ in range(2):
        with pytest.raises(
            SystemExit, match=r"two\.cpp was not compiled: see the compiler's messages; METAKERN_BUILD=0"
        ):
            build()
    assert "error" in capfd.readouterr().err
    Path("a folder", "two.cpp").write_text("int two() { return 3; }\n")
    assert build() == ["two.cpp"]


@pytest.mark.skipif(not HAS_NVCC, reason="needs nvcc")
def test_nvcc_reports_headers_too(setup: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("kernel.cuh").write_text("__global__ void kernel() {}\n")
    Path("kernel.cu").write_text('#include "kernel.cuh"\nvoid launch() { kernel<<<1, 1>>>(); }\n')
    nvcc = shutil.which("nvcc")
    job = setup.Job(setup.Cuda(nvcc, tmp_path, "9.0").command("kernel.cu"), Path("out", "kernel.cu.o"), {})
    assert job.run()
    assert not job.run()
    with Path("kernel.cuh").open("a") as file:
        file.write("// changed\n")
    assert job.run()
    assert not job.run()


# ---------------------------------------------------------------------------------------------- the whole extension

# Stands in for the C++ compiler: notes what it compiles, and reports the headers beside the source that it includes.
COMPILER = r"""#!/bin/sh
case "$*" in *--version*) echo "compiler 1.0"; exit;; esac
while [ $# -gt 0 ]; do
  case "$1" in -c) source=$2;; -o) output=$2;; -MF) report=$2;; esac
  shift
done
: > "$output"
echo "$source $output" >> compiled
folder=$(dirname "$source")
echo "$output: $source" $(sed -n "s|^#include \"\([a-z_]*\.h\)\"|$folder/\1|p" "$source") > "$report"
"""

# Builds with it again and again, in one process: importing torch takes longest. Each build touches a file first; a line
# says what was compiled.
BUILDS = """
import os, sys
from pathlib import Path
from setuptools import Distribution
from setuptools.command import build_ext
from tests.packaging.test_setup import load_setup

setup = load_setup()
build_ext.build_ext.build_extension = lambda *_: None  # no linking
for touched in sys.argv[1:]:
    if touched != "nothing":
        time = os.stat(touched).st_mtime_ns + 10**9
        os.utime(touched, ns=(time, time))
    extension = setup.Extension("metakern._C", sources=[], language="c++")
    command = setup.BuildExtension(Distribution({"ext_modules": [extension]}))
    command.finalize_options()
    command.run()
    notes = Path("compiled")
    print("compiled:", *(sorted(notes.read_text().splitlines()) if notes.exists() else []), sep=";")
    notes.unlink(missing_ok=True)
"""


def builds(root: Path, folder: Path, *touched: str) -> list[list[list[str]]]:
    """Source and object file of what each build of a copy of ``root`` compiles; "nothing" touches no file."""
    shutil.copytree(root / "csrc", folder / "csrc")
    long_ago = time.time_ns() - 10**12  # else a file counts as one that changed while it was compiled
    for path in folder.glob("csrc/*/*"):
        os.utime(path, ns=(long_ago, long_ago))
    compiler = folder / "compiler"
    compiler.write_text(COMPILER)
    compiler.chmod(0o755)
    environment = os.environ | {
        "METAKERN_CUDA": "0",
        "PYTHONPATH": str(root),
        "CC": str(compiler),
        "CXX": str(compiler),
    }
    command = [sys.executable, "-c", BUILDS, *touched]
    result = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=True)
    lines = [line.split(";")[1:] for line in result.stdout.splitlines() if line.startswith("compiled:")]
    return [[note.split() for note in line] for line in lines]


def test_a_build_compiles_what_changed_and_every_kernel_for_every_instruction_set(
    setup: ModuleType, tmp_path: Path
) -> None:
    one, kernel, header = "csrc/lstm_step/cpu.cpp", "csrc/lstm_step/cpu_kernel.cpp", "csrc/core/module.h"
    everything, *later = builds(setup.ROOT, tmp_path, "nothing", "nothing", one, kernel, header, "nothing")
    sources, sets = setup.Sources.find(), len(setup.instruction_sets())
    assert sources.cpu_kernels
    expected = [*sources.once, *sources.autograd, *sources.cpu_kernels * sets]
    assert [source for source, _ in everything] == sorted(expected)
    outputs = [output for _, output in everything]
    assert len(set(outputs)) == len(outputs)
    # The compiler above reports the headers beside a source only: so one file reads module.h.
    assert [[source for source, _ in build] for build in later] == [
        [],
        [one],
        [kernel] * sets,
        ["csrc/core/module.cpp"],
        [],
    ]


def test_whether_there_is_cuda_changes_the_command_of_one_file(setup: ModuleType) -> None:
    facts = setup.build_facts("g++ 12", "2.13.0", None)
    assert set(facts) == {"METAKERN_COMPILER", "METAKERN_TORCH_VERSION"}
    texts = {name: (setup.ROOT / name).read_text() for name in setup.Sources.find().once}
    assert [name for name, text in texts.items() if "METAKERN_NVCC" in text] == ["csrc/core/module.cpp"]
    assert [name for name, text in texts.items() if "METAKERN_CUDA_ARCHITECTURES" in text] == ["csrc/core/module.cpp"]
