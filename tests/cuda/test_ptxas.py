"""The report of registers and spills reads the compiler's output and fails on a spill. Nothing is compiled here."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from bench import ptxas

#: As nvcc 13.0 wrote it, demangled; the last kernel with a stack frame and static shared memory.
REPORT = """\
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function 'void metakern::cuda::reduce_kernel<float>(metakern::cuda::ReduceArguments<float>)' for 'sm_90'
ptxas info    : Function properties for void metakern::cuda::reduce_kernel<float>(metakern::cuda::ReduceArguments<float>)
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 32 registers, used 1 barriers
ptxas info    : Compile time = 58.240 ms
ptxas info    : Compiling entry function 'void metakern::cuda::backward_kernel<float, metakern::cuda::BFloat16, 0>(metakern::cuda::BackwardArguments<float>)' for 'sm_90'
ptxas info    : Function properties for void metakern::cuda::backward_kernel<float, metakern::cuda::BFloat16, 0>(metakern::cuda::BackwardArguments<float>)
    8 bytes stack frame, 4 bytes spill stores, 4 bytes spill loads
ptxas info    : Used 255 registers, used 1 barriers, 8 bytes cumulative stack size
ptxas info    : Compiling entry function 'void metakern::cuda::forward_kernel<metakern::cuda::FmaUnits<float, float, 20> >(metakern::cuda::ForwardArguments<metakern::cuda::FmaUnits<float, float, 20>::Scalar>)' for 'sm_90'
ptxas info    : Function properties for void metakern::cuda::forward_kernel<metakern::cuda::FmaUnits<float, float, 20> >(metakern::cuda::ForwardArguments<metakern::cuda::FmaUnits<float, float, 20>::Scalar>)
    72 bytes stack frame, 184 bytes spill stores, 196 bytes spill loads
ptxas info    : Used 128 registers, used 1 barriers, 72 bytes cumulative stack size, 4096 bytes smem, 400 bytes cmem[0]
ptxas info    : Compile time = 130.631 ms
"""  # noqa: E501

REDUCE = ptxas.Kernel("reduce_kernel<float>", "sm_90", 32, 0, 0, 0, 0)
GENERAL = ptxas.Kernel("backward_kernel<float, BFloat16, 0>", "sm_90", 255, 0, 8, 4, 4)
SPECIALISED = ptxas.Kernel("forward_kernel<FmaUnits<float, float, 20>>", "sm_90", 128, 4096, 72, 184, 196)


def test_the_compilers_report_is_read() -> None:
    assert ptxas.parse(REPORT) == [REDUCE, GENERAL, SPECIALISED]


def test_a_report_that_breaks_off_is_refused() -> None:
    with pytest.raises(ValueError, match=r"no complete report of a kernel: .*FmaUnits<float, float, 20>"):
        ptxas.parse(REPORT[: REPORT.rindex("ptxas info    : Used")])


def test_every_kernel_but_the_general_ones_must_keep_to_its_registers() -> None:
    assert [k.is_general for k in (REDUCE, GENERAL, SPECIALISED)] == [False, True, False]
    assert ptxas.faults([REDUCE, GENERAL]) == []
    assert ptxas.faults([SPECIALISED]) == [
        "forward_kernel<FmaUnits<float, float, 20>> on sm_90: 72 bytes of stack frame, 184 of spill stores, "
        "196 of spill loads"
    ]
    assert ptxas.faults([replace(REDUCE, stack_bytes=8)])


@pytest.mark.parametrize(("kernels", "status"), [([REDUCE, GENERAL], 0), ([SPECIALISED], 1), ([], 1)])
def test_status_and_table(
    kernels: list[ptxas.Kernel], status: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = {"lstm_step": kernels}
    monkeypatch.setattr(ptxas, "find_nvcc", lambda: "nvcc")
    monkeypatch.setattr(ptxas, "nvcc_version", lambda nvcc: "release 13.0")
    monkeypatch.setattr(ptxas, "ARCHITECTURES", ("sm_90",))
    monkeypatch.setattr(ptxas, "compile_kernels", lambda nvcc, source, architecture: found.get(source.parent.name, []))
    app = ptxas.typer.Typer()
    app.command()(ptxas.main)
    result = CliRunner().invoke(app, ["--output", str(tmp_path / "ptxas.json")])
    assert result.exit_code == status, result.output
    written = json.loads((tmp_path / "ptxas.json").read_text())
    assert [kernel["name"] for kernel in written["kernels"]] == sorted(kernel.name for kernel in kernels)
    for kernel in kernels:
        assert kernel.name in result.output


def test_a_compiler_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_HOME", "/nowhere")
    with pytest.raises(FileNotFoundError, match="there is no nvcc in /nowhere/bin"):
        ptxas.find_nvcc()
