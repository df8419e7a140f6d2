"""setup.py: compiler options, CUDA toolkit, architectures, and parts that a build leaves out.

Incremental builds are tested in test_setup_incremental.py.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from types import ModuleType

import pytest

from metakern.core import backend as _backend

ROOT = Path(__file__).parents[2]


def load_setup() -> ModuleType:
    """setup.py as a module."""
    spec = importlib.util.spec_from_file_location("metakern_setup", ROOT / "setup.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def setup() -> ModuleType:
    return load_setup()


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch: pytest.MonkeyPatch, setup: ModuleType) -> None:
    monkeypatch.setattr(setup, "gpu_answers", lambda: True)
    for name in ("METAKERN_BUILD", "METAKERN_CUDA", "CUDA_HOME", "CUDA_PATH", "TORCH_CUDA_ARCH_LIST"):
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


@pytest.mark.parametrize("variable", ["METAKERN_CUDA", "TORCH_CUDA_ARCH_LIST"])
def test_without_a_gpu_the_kernels_are_left_out_unless_they_are_asked_for(
    setup: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    variable: str,
) -> None:
    make_nvcc(tmp_path, f"echo '#$ TOP={tmp_path}' >&2")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    monkeypatch.setattr(setup, "gpu_answers", lambda: False)
    assert setup.Cuda.find() is None
    (line,) = capsys.readouterr().out.splitlines()
    assert line == "no GPU answers here: metakern is built without its CUDA kernels (METAKERN_CUDA=1 compiles them)"
    monkeypatch.setenv(variable, "1" if variable == "METAKERN_CUDA" else "9.0")
    assert setup.Cuda.find() is not None
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("script", "answers"),
    [
        ("echo 'GPU 0: NVIDIA H200 (UUID: GPU-1)'", True),
        ("echo 'No devices found'", False),
        ("echo 'NVIDIA-SMI has failed' ; exit 9", False),
    ],
)
def test_a_gpu_answers_where_the_driver_lists_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str, answers: bool
) -> None:
    tool = tmp_path / "nvidia-smi"
    tool.write_text(f"#!/bin/sh\n{script}\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    assert load_setup().gpu_answers() is answers


def test_without_the_drivers_tool_its_device_file_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert load_setup().gpu_answers() is Path("/dev/nvidia0").exists()


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


def test_the_library_holds_no_symbols_that_nothing_needs() -> None:
    assert _backend._C is not None
    report = subprocess.run(["readelf", "-SW", _backend._C.__file__], capture_output=True, text=True, check=True)
    assert ".dynsym" in report.stdout
    assert ".symtab" not in report.stdout
    assert ".debug" not in report.stdout


# --------------------------------------------------------------------------------------- sources, instruction sets


def test_sources_are_found_by_their_names(setup: ModuleType, tmp_path: Path) -> None:
    names = ["core/module.cpp", "op/schema.cpp", "op/cpu.cpp", "op/cpu_kernel.cpp", "op/cpu_kernel_backward.cpp"]
    names += ["core/autograd.cpp"]
    names += ["op/cuda.cpp", "op/cuda_more.cpp", "op/cuda_kernels.cu", "op/problem.h", "op/deeper/cpu.cpp"]
    for name in names:
        path = tmp_path / "csrc" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    assert setup.Sources.find(tmp_path) == (
        ["csrc/op/cpu_kernel.cpp", "csrc/op/cpu_kernel_backward.cpp"],
        ["csrc/core/module.cpp", "csrc/op/cpu.cpp", "csrc/op/schema.cpp"],
        ["csrc/core/autograd.cpp"],
        ["csrc/op/cuda_kernels.cu"],
        ["csrc/op/cuda.cpp", "csrc/op/cuda_more.cpp"],
    )


def test_what_operators_share_names_none_of_them() -> None:
    operators = {path.parent.name for path in ROOT.glob("csrc/*/schema.cpp")}
    assert {"lstm_step", "inner_update", "mlp_inner_loop"} <= operators
    for path in [*ROOT.glob("csrc/core/*"), *ROOT.glob("csrc/math/*")]:
        assert [name for name in operators if name in path.read_text()] == [], path


def test_a_file_names_its_own_options_in_its_first_line(setup: ModuleType, tmp_path: Path) -> None:
    source = tmp_path / "cpu_kernel.cpp"
    source.write_text("// compile with: -ffp-contract=off -DX=1\n//\n// A kernel.\n")
    assert setup.own_options(source) == ["-ffp-contract=off", "-DX=1"]
    source.write_text("// A kernel.\n// compile with: -DX=1\n")
    assert setup.own_options(source) == []
    # Without it, inner_update would have other bits than PyTorch on a processor that fuses products and sums.
    assert setup.own_options(ROOT / "csrc" / "inner_update" / "cpu_kernel.cpp") == ["-ffp-contract=off"]


def test_the_build_and_the_library_read_one_table_of_instruction_sets(setup: ModuleType) -> None:
    assert _backend._C is not None
    assert list(setup.instruction_sets()) == _backend._C.compiled_cpu_capabilities()


def test_instruction_sets_need_the_options_of_the_features_that_are_asked_for(
    setup: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(setup, "IS_X86", True)
    found = setup.instruction_sets()
    assert list(found) == ["baseline", "avx2", "avx512"]
    assert found["baseline"] == []
    assert found["avx2"] == ["-mavx2", "-mfma"]
    features = [option for option in found["avx512"] if not option.startswith("-Wno-")]
    assert features == ["-mavx512f", "-mavx512dq", "-mavx512bw", "-mavx512vl", "-mfma"]
    monkeypatch.setattr(setup, "IS_X86", False)
    assert setup.instruction_sets() == {"baseline": []}


# ----------------------------------------------------------------------------------------------- options by platform


def test_gnu_ld_keeps_libtorch_and_strips(setup: ModuleType) -> None:
    flags = setup.Flags.of("linux", "")
    assert flags.link == ["-Wl,--push-state,--no-as-needed", "-ltorch", "-Wl,--pop-state", "-Wl,-s"]
    assert flags.compile[-2:] == ["-O3", "-g0"]


def test_apples_linker_gets_options_that_it_knows(setup: ModuleType) -> None:
    flags = setup.Flags.of("darwin", "")
    assert flags.link == ["-ltorch", "-Wl,-S", "-Wl,-x"]
    assert flags.compile == setup.Flags.of("linux", "").compile


@pytest.mark.parametrize("system", ["linux", "darwin"])
def test_a_build_with_sanitizers_keeps_its_symbols(setup: ModuleType, system: str) -> None:
    flags = setup.Flags.of(system, "address,undefined")
    assert flags.link[-1] == "-fsanitize=address,undefined"
    assert not {"-Wl,-s", "-Wl,-S", "-Wl,-x"} & set(flags.link)
    assert {"-O0", "-g", "-fsanitize=address,undefined"} <= set(flags.compile)
    assert "-g0" not in flags.compile


# ------------------------------------------------------------------------------------------------- without kernels


def test_kernels_are_built_unless_the_environment_says_no(setup: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    assert setup.wants_kernels("linux")
    assert setup.wants_kernels("darwin")
    monkeypatch.setenv("METAKERN_BUILD", "0")
    assert not setup.wants_kernels("linux")
    monkeypatch.setenv("METAKERN_BUILD", "no")
    with pytest.raises(SystemExit, match="METAKERN_BUILD must be 0, 1 or unset, got 'no'"):
        setup.wants_kernels("linux")


def test_windows_gets_plain_pytorch_and_a_line_that_says_so(
    setup: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert not setup.wants_kernels("win32")
    (line,) = capsys.readouterr().out.splitlines()
    assert "without its kernels, as plain PyTorch: the kernels need GCC or Clang" in line
    monkeypatch.setenv("METAKERN_BUILD", "1")
    with pytest.raises(SystemExit, match="METAKERN_BUILD=1, but the kernels need GCC or Clang"):
        setup.wants_kernels("win32")


@pytest.mark.parametrize(("module", "package"), [("pybind11", "pybind11"), ("torch.utils.cpp_extension", "torch")])
def test_a_missing_package_is_one_line(
    setup: ModuleType, monkeypatch: pytest.MonkeyPatch, module: str, package: str
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(SystemExit) as raised:
        setup.needed(module)
    message = str(raised.value)
    assert message.startswith(f"{package} is needed to build metakern's kernels")
    assert f"pip install {package}; METAKERN_BUILD=0 installs metakern without" in message
    assert "\n" not in message


@pytest.mark.parametrize("package", ["pybind11", "torch"])
def test_a_build_without_a_package_ends_in_that_line(tmp_path: Path, package: str) -> None:
    (tmp_path / f"{package}.py").write_text(f"raise ImportError('no {package} here')")
    command = [sys.executable, "setup.py", "-q", "build_ext", "--build-lib", str(tmp_path / "lib")]
    environment = os.environ | {"PYTHONPATH": str(tmp_path), "METAKERN_CUDA": "0"}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 1
    (line,) = result.stderr.splitlines()
    assert line.startswith(
        f"{package} is needed to build metakern's kernels, and cannot be imported (no {package} here)"
    )


@pytest.mark.parametrize("compiler", ["no-such-compiler", "false"])
def test_a_missing_compiler_is_one_line(setup: ModuleType, compiler: str) -> None:
    with pytest.raises(SystemExit) as raised:
        setup.compiler_version([compiler])
    message = str(raised.value)
    assert message.startswith("the C++ compiler of metakern's kernels does not run")
    assert "METAKERN_BUILD=0" in message
    assert "\n" not in message


# Inner loops by plain PyTorch, with the answer that autograd gives to two steps of gradient descent.
ADAPTS = """
import sys, warnings
import torch
from torch import nn
import metakern

assert metakern.__file__.startswith(sys.argv[1]), metakern.__file__
torch.manual_seed(0)
net, x, y = nn.Linear(2, 1).double(), torch.randn(3, 5, 2).double(), torch.randn(3, 5, 1).double()
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    found = metakern.adapt(net, x, y, steps=2, lr=0.1, loss=nn.functional.mse_loss)(x)
    found_again = metakern.adapt(net, x, y, steps=2, lr=0.1, loss=nn.functional.mse_loss)(x)
(warning,) = [w for w in caught if "slow reference implementation" in str(w.message)]
assert warning.category is metakern.FallbackWarning
assert warning.filename == "<string>", "the warning points at this script"
expected = []
for task in range(3):
    weight, bias = net.weight, net.bias
    for _ in range(2):
        loss = nn.functional.mse_loss(x[task] @ weight.T + bias, y[task])
        steps = torch.autograd.grad(loss, (weight, bias))
        weight, bias = weight - 0.1 * steps[0], bias - 0.1 * steps[1]
    expected.append(x[task] @ weight.T + bias)
torch.testing.assert_close(found, torch.stack(expected), rtol=1e-12, atol=1e-12)
assert torch.equal(found_again, found)
assert not metakern.build_info()["compiled"]
print(warning.message)
"""


def test_metakern_build_0_installs_and_adapts_without_a_compiler(tmp_path: Path) -> None:
    tree, site, empty = tmp_path / "tree", tmp_path / "site", tmp_path / "bin"
    tree.mkdir()
    empty.mkdir()
    shutil.copytree(ROOT / "metakern", tree / "metakern", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "CHANGELOG.md", "LICENSE"):
        shutil.copy(ROOT / name, tree)
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--no-build-isolation"]
    environment = {name: value for name, value in os.environ.items() if name not in ("CC", "CXX", "PYTHONPATH")}
    environment |= {"METAKERN_BUILD": "0", "PATH": str(empty)}
    subprocess.run([*install, "--target", str(site), str(tree)], env=environment, check=True)
    assert not list(site.rglob("*.so"))
    assert "Root-Is-Purelib: true" in next(site.glob("metakern-*.dist-info/WHEEL")).read_text()
    # -S: an editable install of this package would add its own kernels.
    environment |= {"PYTHONPATH": f"{site}{os.pathsep}{sysconfig.get_path('purelib')}", "METAKERN_BACKEND": ""}
    python = [sys.executable, "-P", "-S", "-c", ADAPTS, str(site)]
    result = subprocess.run(python, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert "metakern._C is not part of this installation: METAKERN_BUILD=0 leaves it out" in result.stdout
    assert "reinstall metakern with a C++ compiler at hand" in result.stdout
