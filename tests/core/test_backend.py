"""Choice of the backend: auto, by name, by environment variable, and without the compiled library."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import textwrap
import warnings
from types import SimpleNamespace

import pytest
import torch

import metakern
from metakern import FallbackWarning
from metakern.core import backend as _backend
from metakern.ops import LSTMState, lstm_step
from tests.conftest import BACKENDS, CAPABILITIES
from tests.problems import make_problem

CPU = torch.device("cpu")


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a fresh interpreter, as the package reads its environment on import."""
    inherited = {
        name: value for name, value in os.environ.items() if not name.startswith(("METAKERN_", "TRITON_INTERPRET"))
    }
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        env=inherited | environment,
        timeout=120,
        check=False,
    )


def output_of(code: str, **environment: str) -> str:
    """Output of a fresh interpreter; shows its traceback if it fails."""
    result = run_python(code, **environment)
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


# A call and the backend that served it, determined by whether the operator ran.
SERVED = """
import torch, metakern
from metakern.core import backend as _backend
from metakern.ops import LSTMState, lstm_step
from torch import nn

def served(backend):
    lstm, head = nn.LSTM(2, 3, 1), nn.Linear(3, 1)
    state = LSTMState.zeros(4, hidden_size=3, num_layers=1)
    x = torch.ones(4, requires_grad=True)
    out, _ = lstm_step(x, x, state, [*lstm.parameters(), *head.parameters()], backend=backend)
    nodes, seen = [out.grad_fn], set()
    while nodes:
        node = nodes.pop()
        if node is not None and node not in seen:
            seen.add(node)
            nodes += [f for f, _ in node.next_functions]
    return "reference" if any("Sigmoid" in type(node).__name__ for node in seen) else "cpp"
"""


# ----------------------------------------------------------------------------------------------- auto and by name


def test_auto_takes_the_kernels_on_the_cpu() -> None:
    assert _backend.resolve(None, CPU) == "cpp"
    assert _backend.resolve("auto", CPU) == "cpp"


@pytest.mark.parametrize("name", BACKENDS)
def test_a_backend_is_served_by_its_name(name: str) -> None:
    assert name in _backend.BACKENDS
    assert _backend.resolve(name, CPU) == name


def test_an_unknown_name_is_refused() -> None:
    for name in ("cuda?", "CPP", "Reference"):
        message = f"backend must be one of auto, cpp, cuda, triton, reference, got {name!r}"
        with pytest.raises(ValueError, match=re.escape(message)):
            _backend.resolve(name, CPU)


def test_the_kernels_asked_for_by_name_on_another_device_say_what_is_missing() -> None:
    message = "backend 'cpp' cannot run: the C\\+\\+ kernels serve tensors on the CPU, not on meta"
    with pytest.raises(RuntimeError, match=message):
        _backend.resolve("cpp", torch.device("meta"))
    problem = make_problem(5, 3, 1, device="meta")
    with pytest.raises(RuntimeError, match=message):
        problem.run(backend="cpp")


def test_auto_on_another_device_warns_once_and_points_at_the_call(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_backend, "_warned", set())
    problem = make_problem(5, 3, 1, device="meta")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            new_params, state = lstm_step(problem.params, problem.grads, problem.state, problem.weights)
    assert new_params.is_meta
    assert isinstance(state, LSTMState)
    assert [w.category for w in caught] == [FallbackWarning]
    assert "reference implementation" in str(caught[0].message)
    assert "not on meta" in str(caught[0].message)
    assert caught[0].filename == __file__


def test_the_kernels_and_the_reference_say_nothing() -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for name in (None, "auto", *BACKENDS):
            make_problem(5, 3, 1).run(backend=name)
    assert [str(w.message) for w in caught if w.category is FallbackWarning] == []


# ---------------------------------------------------------------------------------------------------------- GPUs


@pytest.mark.parametrize(
    ("entry", "runs_on", "not_on"),
    [
        ("8.0", [(8, 0), (8, 6), (8, 9)], [(7, 5), (9, 0), (10, 0)]),
        ("8.6", [(8, 6), (8, 9)], [(8, 0)]),
        ("9.0a", [(9, 0)], [(9, 1), (10, 0)]),
        ("10.0+PTX", [(10, 0), (10, 3), (12, 0)], [(9, 0)]),
        ("9.0a+PTX", [(9, 0)], [(10, 0)]),
    ],
)
def test_devices_that_run_code_for_an_architecture(
    entry: str, runs_on: list[tuple[int, int]], not_on: list[tuple[int, int]]
) -> None:
    architecture = _backend.Architecture.parse(entry)
    assert [capability for capability in runs_on + not_on if architecture.runs_on(capability)] == runs_on


@pytest.fixture
def volta(monkeypatch: pytest.MonkeyPatch) -> torch.device:
    """A device of compute capability 7.0, under kernels for 8.0 and 9.0."""
    properties = SimpleNamespace(major=7, minor=0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
    monkeypatch.setattr(_backend, "_ARCHITECTURES", [_backend.Architecture.parse(a) for a in ("8.0", "9.0")])
    monkeypatch.setattr(_backend, "_HAS_TRITON", False)
    return torch.device("cuda", 0)


def test_a_device_without_kernels_is_named_beside_what_was_built(volta: torch.device) -> None:
    message = f"cuda:0 has compute capability 7.0, metakern was built for {_backend._C.cuda_architectures}; reinstall"
    with pytest.raises(RuntimeError, match=re.escape(message)):
        _backend.resolve("cuda", volta)


def test_auto_on_a_gpu_tries_cuda_then_triton_then_the_reference(
    volta: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_backend, "_warned", set())
    with pytest.warns(FallbackWarning, match=r"has compute capability 7\.0.*; Triton is not installed"):
        assert _backend.resolve("auto", volta) == "reference"
    monkeypatch.setattr(_backend, "_HAS_TRITON", True)
    assert _backend.resolve("auto", volta) == "triton"
    monkeypatch.setattr(_backend, "_ARCHITECTURES", [_backend.Architecture.parse("7.0")])
    assert _backend.resolve("auto", volta) == "cuda"


def test_a_build_without_cuda_says_so(volta: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_backend, "_ARCHITECTURES", [])
    with pytest.raises(RuntimeError, match="backend 'cuda' cannot run: metakern was built without CUDA"):
        _backend.resolve("cuda", volta)


@pytest.mark.parametrize(
    ("backend", "message"),
    [
        ("cuda", "the CUDA kernels serve tensors on cuda, not on cpu"),
        ("triton", "Triton's kernels serve tensors on cuda (on the CPU with TRITON_INTERPRET=1), not on cpu"),
    ],
)
def test_backends_for_gpus_refuse_the_cpu(backend: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_backend, "_HAS_TRITON", True)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(RuntimeError, match=re.escape(f"backend '{backend}' cannot run: {message}")):
        make_problem(5, 3, 1).run(backend=backend)


def test_triton_asked_for_where_it_is_missing_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_backend, "_HAS_TRITON", False)
    with pytest.raises(RuntimeError, match=re.escape("Triton is not installed (pip install 'metakern[triton]')")):
        make_problem(5, 3, 1).run(backend="triton")


# --------------------------------------------------------------------------------------------------- environment


def test_environment_variable_replaces_auto() -> None:
    # An explicit backend="auto" is replaced too; a backend requested by name is not.
    asked = (
        SERVED + "\nprint(metakern.build_info()['backend'], *(served(b) for b in (None, 'auto', 'cpp', 'reference')))"
    )
    assert output_of(asked, METAKERN_BACKEND="reference") == "reference reference reference cpp reference"
    assert output_of(asked, METAKERN_BACKEND="") == "auto cpp cpp cpp reference"


def test_environment_variable_with_an_unknown_backend_fails_the_import() -> None:
    result = run_python("import metakern", METAKERN_BACKEND="gpu")
    assert result.returncode != 0
    assert "ValueError: METAKERN_BACKEND must be one of auto, cpp, cuda, triton, reference, got 'gpu'" in result.stderr


def test_environment_variable_asks_for_kernels_where_there_are_none() -> None:
    code = """
    import torch
    from metakern.core import backend as _backend
    try:
        _backend.resolve(None, torch.device("meta"))
    except RuntimeError as error:
        print(error)
    """
    assert "backend 'cpp' cannot run" in output_of(code, METAKERN_BACKEND="cpp")


# ---------------------------------------------------------------------------------------------- instruction sets


def test_the_best_instruction_set_is_used_unless_another_is_forced() -> None:
    code = "import metakern; i = metakern.build_info(); print(i['cpu_capability'], *i['cpu_capabilities'])"
    used, *available = output_of(code).split()
    assert used == available[-1]
    assert available == [name for name in CAPABILITIES if name in available]
    assert available[0] == "baseline"
    assert output_of(code, METAKERN_CPU_CAPABILITY="baseline").split()[0] == "baseline"


def test_an_unknown_instruction_set_in_the_environment_fails_the_import() -> None:
    # Requested by name: falling back to the slow reference would hide that it is unavailable.
    available = ", ".join(_backend._C.available_cpu_capabilities())
    result = run_python("import metakern", METAKERN_CPU_CAPABILITY="AVX2")
    expected = f"ValueError: METAKERN_CPU_CAPABILITY must be one of those available here ({available}), got 'AVX2'"
    assert result.returncode != 0, "the import went on without the instruction set that was asked for"
    assert expected in result.stderr


def test_an_unknown_instruction_set_is_refused_and_the_old_one_kept(capability: str) -> None:
    with pytest.raises(ValueError, match="CPU capability must be one of those available here"):
        _backend._C.set_cpu_capability("sse9")
    assert _backend._C.cpu_capability() == capability == metakern.build_info()["cpu_capability"]


# ------------------------------------------------------------------------------------------------ facts of the build


def test_build_info() -> None:
    info = metakern.build_info()
    assert info["compiled"] is True
    assert info["metakern"] == metakern.__version__
    assert info["torch"] == torch.__version__
    assert info["compiler"]
    assert info["built_with_torch"]
    assert bool(info["cuda_architectures"]) == bool(info["nvcc"])
    assert info["backend"] in _backend.BACKENDS


# --------------------------------------------------------------------------------------- without compiled kernels

WITHOUT_LIBRARY = "import sys; sys.modules['metakern._C'] = None\n"


def test_without_the_library_auto_falls_back_with_one_warning() -> None:
    code = """
    import warnings
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        print(served(None), served("auto"), served("reference"), served(None))
    print([w.category is metakern.FallbackWarning for w in caught], str(caught[0].message))
    """
    names, message = output_of(WITHOUT_LIBRARY + SERVED + textwrap.dedent(code)).splitlines()
    assert names == "reference reference reference reference"
    assert message.startswith(
        "[True] metakern uses its slow reference implementation: the compiled kernels could not be loaded"
    )
    assert "metakern._C" in message


def test_without_the_library_import_and_rule_say_nothing_until_a_step_is_taken() -> None:
    code = """
    import warnings
    warnings.simplefilter("error")
    import metakern
    rule = metakern.rules.CoordinatewiseLSTM(3, 1, backend="reference")
    import torch
    rule(torch.ones(2), torch.ones(2), rule.init_state(torch.ones(2)))
    info = metakern.build_info()
    print(info["compiled"], info["backend"], "metakern._C" in info["reason"])
    """
    assert output_of(WITHOUT_LIBRARY + textwrap.dedent(code)) == "False auto True"


def test_without_the_library_the_kernels_asked_for_by_name_say_what_is_missing() -> None:
    code = """
    for backend in ("cpp",):
        try:
            served(backend)
        except RuntimeError as error:
            print(error)
    """
    message = output_of(WITHOUT_LIBRARY + SERVED + textwrap.dedent(code))
    assert message.startswith("backend 'cpp' cannot run: the compiled kernels could not be loaded")
    assert "reinstall metakern with a C++ compiler at hand" in message


def test_without_the_library_the_environment_cannot_ask_for_it_silently() -> None:
    result = run_python(WITHOUT_LIBRARY + SERVED + "\nserved(None)", METAKERN_BACKEND="cpp")
    assert result.returncode != 0
    assert "RuntimeError: backend 'cpp' cannot run: the compiled kernels could not be loaded" in result.stderr
