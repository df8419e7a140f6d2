"""The choice between evaluating all tasks at once, by torch.vmap, and one after another."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from types import CodeType
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from metakern.core.exclusive import exclusive
from metakern.core.random_state import random_state, set_random_state
from metakern.core.text import first_line
from metakern.core.torch_private import GLOBAL_BACKWARD_HOOKS
from metakern.core.transforms import is_transformed
from metakern.core.warn import warn_user
from metakern.inner_loop.failures import Instead, check_no_mixed_meta, explained, module_that_failed
from metakern.inner_loop.remembered import Remembered

Result = TypeVar("Result")

#: How the tasks are evaluated: all at once (True), one after another (False), or at once if torch.vmap can run the
#: model ("auto").
Vectorize = bool | str


def check_vectorize(vectorize: Any) -> None:
    """Raise TypeError unless ``vectorize`` is a bool or "auto"."""
    if not isinstance(vectorize, bool) and vectorize != "auto":
        raise TypeError(f"vectorize must be True, False or 'auto', got {vectorize!r}")


class Slower(Exception):
    """Raised within torch.vmap, with "auto", by a model that a loop over the tasks evaluates faster.

    The call is repeated as a loop, and so are later calls with the model, without a warning.
    """


class Vectorization:
    """How the tasks of one call are evaluated: by torch.vmap or in a loop.

    With "auto" the CPU evaluates models with large convolutions that no kernel serves in a loop, which is faster: see
    :class:`Slower`.

    With "auto" a call that fails under torch.vmap is repeated as a loop, with the same random numbers. The failure is
    cached, and later calls with the same modules, modes, hooks and loss use the loop at once. A stale entry costs only
    time: both ways give the same values.

    Args:
        model: the model to evaluate
        loss: loss of one task
        vectorize: see :data:`Vectorize`; within torch.compile and torch.func "auto" means True

    Attributes:
        wanted: ``vectorize``
        at_once: whether torch.vmap evaluates all tasks at once
        slower: whether it does not because a loop is faster
    """

    def __init__(self, model: nn.Module, loss: Callable[..., Any], vectorize: Vectorize) -> None:
        self.wanted, self.at_once, self.slower = vectorize, bool(vectorize), False
        self._model, self._loss = model, loss
        compiling = torch.compiler.is_compiling()
        self._hooked = _module_with_backward_hook(model, loss) if vectorize and not compiling else ""
        if vectorize == "auto" and not is_transformed():
            cached = _loops.get(model, self._kind())
            self.at_once, self.slower = not self._hooked and cached is None, cached is True

    def run(self, evaluate: Callable[[Instead], Result], data: Mapping[str, Tensor]) -> Result:
        """Run ``evaluate({})``, which reads ``at_once``; falls back to the loop with "auto".

        Args:
            evaluate: the whole evaluation; takes replacements for some of ``data``. It may be called twice, and again
                after an error, to find its cause
            data: the caller's tensors, by their names in messages

        Raises:
            RuntimeError: if ``vectorize=True`` and torch.vmap cannot run the model
            TypeError, ValueError: for data whose dtype, device or width does not fit the model, and if only some
                tensors are on "meta"
        """
        with exclusive(self._model):
            return self._run(evaluate, data)

    def _run(self, evaluate: Callable[[Instead], Result], data: Mapping[str, Tensor]) -> Result:
        check_no_mixed_meta(self._model, data)
        if is_transformed():
            if self._hooked:
                raise RuntimeError(f"torch.func cannot transform the model: {self._hooked}; remove it")
            return evaluate({})
        if self._hooked and self.at_once:
            raise RuntimeError(f"vectorize=True cannot run the model: {self._hooked}; {_WAY_OUT}")
        if self._hooked and _loops.get(self._model, self._kind()) is None:
            self._remember(f": {self._hooked}")
        if not self.at_once:
            return self._loop(evaluate, data)
        device = next(self._model.parameters()).device
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            return evaluate({})  # capture of a CUDA graph allows neither random states nor a retry
        state = random_state(device)
        try:
            return evaluate({})
        except torch.OutOfMemoryError:
            raise
        except Slower:
            cause, failure = "", None
        except Exception as error:
            cause = _cause(error, self._model)
            # The error's traceback would keep everything computed alive.
            failure = None if self.wanted == "auto" else error
        set_random_state(state)
        self.at_once = False
        result = self._loop(evaluate, data)  # an error here, too, is not torch.vmap's
        if not cause:
            self.slower = True
            _loops.put(self._model, self._kind(), True)
            return result
        if failure is None:
            self._remember(f", as torch.vmap fails in {cause}")
            return result
        set_random_state(state)
        self.at_once = True
        if not isinstance(failure, RuntimeError):  # the error explains itself
            raise failure
        raise RuntimeError(f"vectorize=True cannot run the model: torch.vmap fails in {cause}; {_WAY_OUT}") from failure

    def _remember(self, reason: str) -> None:
        _loops.put(self._model, self._kind(), False)
        warn_user(f"the tasks are evaluated one after another{reason}; vectorize=False chooses it without this warning")

    def _kind(self) -> Hashable:
        """Cache key: everything that decides whether torch.vmap can run the model. Holds no module, to leak none."""
        code = getattr(self._loss, "__code__", None)
        of_loss = code if isinstance(code, CodeType) else type(self._loss)
        return of_loss, self._hooked, tuple((type(module), module.training) for module in self._model.modules())

    def _loop(self, evaluate: Callable[[Instead], Result], data: Mapping[str, Tensor]) -> Result:
        def works(instead: Instead) -> bool:
            try:
                evaluate(instead)
            except Exception:
                return False
            return True

        try:
            return evaluate({})
        except (RuntimeError, IndexError) as error:
            better = explained(error, self._model, data, works)
            if better is error:
                raise
            raise better from error


_WAY_OUT = 'pass vectorize="auto" or False: the tasks are then evaluated one after another'


# ------------------------------------------------------------------------------------------------------------- memory


#: Cache of models for the loop, keyed by module types, train() or eval() modes, hooks and loss: True where the loop is
#: faster, False where torch.vmap cannot run the model.
_loops: Remembered[bool] = Remembered(most=16)


# -------------------------------------------------------------------------------------------------------------- hooks


def _module_with_backward_hook(model: nn.Module, loss: Callable[..., Any]) -> str:
    """A message that names a module with a backward hook, which torch.vmap would not call; empty if there is none."""
    if any(GLOBAL_BACKWARD_HOOKS):
        return "there are backward hooks for all modules, which torch.vmap does not call"
    named = list(model.named_modules())
    if isinstance(loss, nn.Module):
        named += [(f"loss.{name}" if name else "loss", module) for name, module in loss.named_modules()]
    for name, module in named:
        if module._backward_hooks or module._backward_pre_hooks:
            of = f"module {name!r}" if name else "the model"
            return f"{of} ({type(module).__name__}) has a backward hook, which torch.vmap does not call"
    return ""


# ----------------------------------------------------------------------------------------------------------- messages


def _cause(error: Exception, model: nn.Module) -> str:
    """The module that torch.vmap fails in, and the first line of the error."""
    found = module_that_failed(error, model)
    where = "the model or the loss" if found is None else found.label
    return f"{where}: {first_line(error)}"
