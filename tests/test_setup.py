"""What setup.py builds: the CUDA toolkit that it finds or leaves out, and the architectures that it compiles for."""

from __future__ import annotations

import importlib.util
import os
import subprocess
from pathlib import Path
from types import ModuleType

import pytest

from metakern import _backend

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def setup() -> ModuleType:
    spec = importlib.util.spec_from_file_location("metakern_setup", ROOT / "setup.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("METAKERN_CUDA", "CUDA_HOME", "CUDA_PATH", "TORCH_CUDA_ARCH_LIST"):
        monkeypatch.delenv(name, raising=False)


def make_nvcc(home: Path, script: str) -> None:
    """A stand-in for nvcc in ``home``/bin."""
    nvcc = home / "bin" / "nvcc"
    nvcc.parent.mkdir(parents=True)
    nvcc.write_text(f"#!/bin/sh\n{script}\n")
    nvcc.chmod(0o755)


def test_the_toolkit_is_where_nvcc_says_that_it_lives(
    setup: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # nvcc on PATH may be a script or a link far from the toolkit.
    (tmp_path / "toolkit").mkdir()
    make_nvcc(tmp_path / "elsewhere", f"echo '#$ TOP={tmp_path}/toolkit/bin/..' >&2")
    (tmp_path / "toolkit" / "bin").mkdir()
    monkeypatch.setenv("PATH", f"{tmp_path}/elsewhere/bin{os.pathsep}{os.environ['PATH']}")
    cuda = setup.Cuda.find()
    assert cuda.home == tmp_path / "toolkit"
    assert cuda.nvcc == f"{tmp_path}/elsewhere/bin/nvcc"
    assert cuda.architectures == "8.0;9.0;10.0+PTX"


def test_cuda_home_comes_before_path(setup: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_nvcc(tmp_path, f"echo '#$ TOP={tmp_path}' >&2")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "9.0")
    assert setup.Cuda.find() == (f"{tmp_path}/bin/nvcc", tmp_path, "9.0")


def test_without_nvcc_there_is_no_cuda_unless_it_is_demanded(
    setup: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    assert setup.Cuda.find() is None
    monkeypatch.setenv("METAKERN_CUDA", "1")
    with pytest.raises(SystemExit, match=f"METAKERN_CUDA=1, but there is no nvcc in {tmp_path}/bin"):
        setup.Cuda.find()


def test_cuda_can_be_left_out(setup: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_nvcc(tmp_path, "exit 1")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    monkeypatch.setenv("METAKERN_CUDA", "0")
    assert setup.Cuda.find() is None


def test_an_nvcc_that_does_not_work_is_an_error(
    setup: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_nvcc(tmp_path, "echo 'no host compiler' >&2; exit 1")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    with pytest.raises(SystemExit, match=r"does not work \(METAKERN_CUDA=0 builds without it\):\nno host compiler"):
        setup.Cuda.find()


def test_an_unknown_value_of_metakern_cuda_is_an_error(setup: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("METAKERN_CUDA", "yes")
    with pytest.raises(SystemExit, match="METAKERN_CUDA must be 0, 1 or unset, got 'yes'"):
        setup.Cuda.find()


def test_architectures_become_options_of_nvcc(setup: ModuleType) -> None:
    assert setup.Cuda("nvcc", ROOT, "8.0;9.0a;10.0+PTX").targets() == [
        "-gencode=arch=compute_80,code=sm_80",
        "-gencode=arch=compute_90a,code=sm_90a",
        "-gencode=arch=compute_100,code=sm_100",
        "-gencode=arch=compute_100,code=compute_100",
    ]


@pytest.mark.parametrize("entry", ["Hopper", "90", "9.0+ptx", "sm_90"])
def test_architectures_of_another_form_are_errors(setup: ModuleType, entry: str) -> None:
    with pytest.raises(SystemExit, match=r"TORCH_CUDA_ARCH_LIST must hold entries like 9\.0 or 10\.0"):
        setup.Cuda.served(f"8.0;{entry}")


def test_architectures_before_8_are_left_out(setup: ModuleType) -> None:
    assert setup.Cuda.served("7.0 7.5+PTX;8.6 9.0+PTX") == "8.6;9.0+PTX"
    with pytest.raises(SystemExit, match=r"must hold 8\.0 or newer .*, got '6\.0;7\.5'"):
        setup.Cuda.served("6.0;7.5")


def test_the_library_needs_libtorch() -> None:
    # In a torch with CUDA, libtorch brings in the library with the streams and guards that the operators ask for.
    assert _backend._C is not None
    report = subprocess.run(["readelf", "-d", _backend._C.__file__], capture_output=True, text=True, check=True)
    assert "[libtorch.so]" in report.stdout
