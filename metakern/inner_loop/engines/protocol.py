"""The interface of the inner loop's engines.

A new engine is one file with a class of this protocol, and one entry in :data:`metakern.inner_loop.engines.ENGINES`.
"""

from __future__ import annotations

from typing import ClassVar, Protocol

from torch import Tensor

from metakern.inner_loop.arguments import Call


class Unserved(Exception):
    """Raised by an engine that does not serve a call; the message says why.

    Attributes:
        cause: set by subclasses: the reason without details of the data, as warnings come once per cause
    """

    cause: ClassVar[str] = ""


class Engine(Protocol):
    """One way to run inner loops.

    Engines are asked in order, and the first that serves runs the call; the last is plain PyTorch. An engine must
    decline, with a reason, where plain PyTorch measures faster, unless the caller requests the engine by name.

    Attributes:
        name: name in messages
    """

    name: str

    def serves(self, call: Call) -> str | None:
        """Why it does not serve the call, or None if it does. It may store its plan in ``call.prepared``."""
        ...

    def adapt(self, call: Call) -> dict[str, Tensor]:
        """Adapted parameters by name, [T, *shape] each, for a call that it serves.

        Raises:
            Unserved: for a reason found only during the run; the next engine is asked then
        """
        ...

    def meta_loss(self, call: Call) -> Tensor:
        """Query losses [T] for a call that it serves; raises as :meth:`adapt` does."""
        ...

    def meta_backward(self, call: Call, gradient: Tensor | None) -> Tensor | None:
        """Query losses [T]; adds meta-gradients to ``grad`` without autograd. None if the engine cannot.

        Args:
            call: a call that it serves
            gradient: gradient of the objective by the losses, [T]; None: the objective is their mean
        """
        ...

    def described(self, call: Call) -> str:
        """How it served the call, for ``explain``."""
        ...

    def missed(self, call: Call, cause: str) -> None:
        """Called when a later engine had to serve the call: warn, once per cause, if that is much slower."""
        ...
