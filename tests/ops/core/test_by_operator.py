"""Gradients by a backward operator, recorded as nodes of C++, tested on mlp_meta_loss and an operator of this file."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

import metakern
from metakern.core import backend as _backend
from metakern.ops.core.define_op import Gradient, define_op
from metakern.ops.lstm_step.autograd import step, step_with_gates
from metakern.ops.mlp_inner_loop.autograd import meta_loss

# y_i = x w_i and their sum where there is a bias; kept: x + 1, which the backward reads.
SCHEMA = (
    "toy_twin(Tensor x, Tensor[] weights, Tensor? bias, Tensor index, float scale, int[] sizes) -> (Tensor[], Tensor)"
)
BACKWARD = (
    "toy_twin_backward(Tensor[] grad_scaled, Tensor kept, Tensor x, Tensor[] weights, Tensor? bias, float scale) "
    "-> (Tensor, Tensor[])"
)


def kernel(x: Tensor, weights: list[Tensor], bias: Tensor | None, index: Tensor, scale: float, sizes: Any) -> Any:
    if scale < 0:
        raise ValueError(f"scale must not be negative, got {scale}")
    return [scale * x * w + (torch.zeros(()) if bias is None else bias) for w in weights], x + 1


def backward_kernel(
    grad_scaled: list[Tensor], kept: Tensor, x: Tensor, weights: list[Tensor], bias: Tensor | None, scale: float
) -> Any:
    grads = [scale * g for g in grad_scaled]
    return sum(g * w for g, w in zip(grads, weights, strict=True)), [g * (kept - 1) for g in grads]


LIBRARY = torch.library.Library("metakern", "FRAGMENT")
for text, function in ((SCHEMA, kernel), (BACKWARD, backward_kernel)):
    LIBRARY.define(text)
    LIBRARY.impl(text.partition("(")[0], function, "CPU")

TWIN_BACKWARD = define_op(
    BACKWARD,
    results=("grad_x", "grad_weights"),
    shapes=lambda a: (a.kept.new_empty(a.kept.shape), [w.new_empty(w.shape) for w in a.weights]),
    family="toy_twin",
)
DECLARED: dict[str, Any] = {
    "results": ("scaled", "kept"),
    "shapes": lambda a: ([a.x.new_empty(a.x.shape) for _ in a.weights], a.x.new_empty(a.x.shape)),
    "family": "toy_twin",
}
TWIN = define_op(
    SCHEMA,
    gradient=Gradient(
        TWIN_BACKWARD, of=("x", "weights"), saves=("weights", "bias", "kept"), shapes=("x",), private=("kept",)
    ),
    **DECLARED,
)

needs_library = pytest.mark.skipif(
    _backend.autograd_library() is None, reason="the library was not built, or with another torch"
)


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def leaves() -> tuple[Tensor, list[Tensor]]:
    return drawn(5).requires_grad_(), [drawn(5, seed=i).requires_grad_() for i in (1, 2)]


def call(x: Tensor, weights: list[Tensor], bias: Tensor | None = None, scale: float = 0.5) -> list[Tensor]:
    found: list[Tensor] = TWIN.kernel("compiled")(x, weights, bias, torch.arange(2), scale, [1, 2])
    return found


@pytest.fixture(params=["C++", "Python"])
def language(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Which language records the calls; both must behave alike."""
    if request.param == "Python":
        monkeypatch.setattr(TWIN.kernel("compiled"), "recorder", None)
    elif _backend.autograd_library() is None:
        pytest.skip("the library was not built, or with another torch")
    return str(request.param)


@needs_library
def test_calls_are_recorded_in_c_plus_plus() -> None:
    x, weights = leaves()
    assert type(call(x, weights)[0].grad_fn).__name__ == "CppFunction"
    assert call(x.detach(), [w.detach() for w in weights])[0].grad_fn is None
    with torch.no_grad():
        assert call(x, weights)[0].grad_fn is None


@needs_library
def test_python_records_what_a_mode_must_see() -> None:
    class Mode(TorchFunctionMode):
        seen: list[Any] = []  # noqa: RUF012

        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.seen.append(func)
            return func(*args, **(kwargs or {}))

    with Mode() as mode:
        found = call(*leaves())
    assert type(found[0].grad_fn).__name__ == "_RecordedBackward"
    assert torch.ops.metakern.toy_twin.default in mode.seen


def test_gradients(language: str) -> None:
    x, weights = leaves()
    for bias in (None, drawn(5, seed=3)):
        first, second = call(x, weights, bias)
        wanted = [0.5 * x * w + (0 if bias is None else bias) for w in weights]
        for of_first, of_second in ((True, True), (False, True)):  # an unused result has a gradient of zero
            total = sum(y.sin().sum() for y, used in ((first, of_first), (second, of_second)) if used)
            expected = sum(y.sin().sum() for y, used in zip(wanted, (of_first, of_second), strict=True) if used)
            assert isinstance(total, Tensor)
            assert isinstance(expected, Tensor)
            got = torch.autograd.grad(total, [x, *weights], retain_graph=True)
            want = torch.autograd.grad(expected, [x, *weights], retain_graph=True, allow_unused=True)
            for a, b in zip(got, want, strict=True):
                torch.testing.assert_close(a, torch.zeros_like(a) if b is None else b)


def test_a_graph_is_used_once_unless_retained(language: str) -> None:
    x, weights = leaves()
    total = call(x, weights)[0].sum()
    (kept,) = torch.autograd.grad(total, x, retain_graph=True)
    (again,) = torch.autograd.grad(total, x)
    assert torch.equal(kept, again)
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        torch.autograd.grad(total, x)


def test_saved_tensors_must_not_change(language: str) -> None:
    x, weights = leaves()
    total = call(x, weights)[0].sum()
    with torch.no_grad():
        x.add_(1)  # of x only the shape counts
    torch.autograd.grad(total, x, retain_graph=True)
    with torch.no_grad():
        weights[0].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(total, x)


def test_second_derivatives_raise(language: str) -> None:
    x, weights = leaves()
    (grad,) = torch.autograd.grad(call(x, weights)[0].sum(), x, create_graph=True)
    assert grad.requires_grad
    with pytest.raises(RuntimeError, match="twin provides no second derivative of its own"):
        torch.autograd.grad(grad.sum(), weights[0])


def test_a_gradient_that_passes_through_has_derivatives(language: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of lstm_step, whose new params are params plus something else."""
    if language == "Python":
        for operator in (step, step_with_gates):
            monkeypatch.setattr(operator.kernel("compiled"), "recorder", None)
    params, outer = torch.zeros(4, requires_grad=True), torch.rand(4, requires_grad=True)
    rule = metakern.rules.CoordinatewiseLSTM()
    new, _ = rule(params, torch.randn(4), rule.init_state(params))
    (grad,) = torch.autograd.grad(new, params, outer, create_graph=True)
    torch.testing.assert_close(grad, outer)
    (second,) = torch.autograd.grad(grad.sum(), outer)
    torch.testing.assert_close(second, torch.ones(4))


def test_other_tensors_must_not_require_gradients(language: str) -> None:
    with pytest.raises(RuntimeError, match="twin provides no gradient of bias, which requires one"):
        call(*leaves(), bias=drawn(5).requires_grad_())


def test_errors_of_the_kernel_keep_their_kind(language: str) -> None:
    with pytest.raises(ValueError, match="scale must not be negative, got -1"):
        call(*leaves(), scale=-1.0)
    with pytest.raises((TypeError, RuntimeError), match="scale"):
        call(*leaves(), scale="large")  # type: ignore[arg-type]


def test_hooks_run(language: str) -> None:
    x, weights = leaves()
    found = call(x, weights)[0]
    seen: list[str] = []
    x.register_hook(lambda grad: seen.append("leaf"))
    found.register_hook(lambda grad: grad * 2)
    assert found.grad_fn is not None
    found.grad_fn.register_hook(lambda inputs, outputs: seen.append("node"))
    (grad,) = torch.autograd.grad(found.sum(), x)
    torch.testing.assert_close(grad, weights[0])
    assert seen == ["leaf", "node"] or seen == ["node", "leaf"]


def test_hooks_of_saved_tensors_see_what_is_saved(language: str) -> None:
    x, weights = leaves()
    packed: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        packed.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor * 2):
        total = call(x, weights)[0].sum()
    (grad,) = torch.autograd.grad(total, x)
    torch.testing.assert_close(grad, weights[0])  # half of twice the saved weight
    assert len(packed) == 3


def test_anomaly_mode_names_the_line_of_the_call(language: str) -> None:
    x, weights = leaves()
    with torch.autograd.set_detect_anomaly(True):
        total = (call(x, weights)[0] * float("nan")).sum()
        with (
            pytest.warns(UserWarning, match=r"(?s)Traceback of forward call.*test_anomaly_mode_names_the_line"),
            pytest.raises(RuntimeError, match="returned nan values"),
        ):
            total.backward()


def test_a_graph_holds_what_its_backward_reads_and_nothing_else(language: str) -> None:
    x, weights = leaves()
    bias, index = drawn(5), torch.arange(2)
    of_bias, of_index = weakref.ref(bias), weakref.ref(index)
    found = TWIN.kernel("compiled")(x, weights, bias, index, 0.5, [])
    del bias, index
    assert of_index() is None
    assert of_bias() is not None
    del found
    assert of_bias() is None


@needs_library
def test_compiled_autograd_traces_the_node() -> None:
    x, weights = leaves()
    with torch._dynamo.compiled_autograd._enable(torch.compile(backend="eager")):
        call(x, weights)[0].sum().backward()
    torch.testing.assert_close(x.grad, 0.5 * weights[0])


def test_names_that_do_not_match_are_errors() -> None:
    with pytest.raises(ValueError, match=r"the arguments of the backward of toy_twin must be among .*, got 'kept'"):
        define_op(SCHEMA, gradient=Gradient(TWIN_BACKWARD, of=("x",)), **DECLARED | {"results": ("scaled", "shifted")})


def test_both_languages_give_the_same_bits() -> None:
    kernel = meta_loss.kernel("compiled")
    recorder, found = kernel.recorder, []
    if recorder is None:
        pytest.skip("the library was not built, or with another torch")
    model = torch.nn.Sequential(torch.nn.Linear(2, 7), torch.nn.Tanh(), torch.nn.Linear(7, 1))
    sets = [(torch.randn(5, n, 2), torch.randn(5, n, 1)) for n in (4, 3)]
    lr, weights = torch.tensor(0.1, requires_grad=True), torch.rand(5)
    for each in (recorder, None):
        kernel.recorder = each
        try:
            losses = metakern.meta_loss(model, *sets, steps=3, lr=lr)
            found.append([losses, *torch.autograd.grad(losses @ weights, [lr, *model.parameters()])])
        finally:
            kernel.recorder = recorder
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
