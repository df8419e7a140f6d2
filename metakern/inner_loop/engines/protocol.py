"""What an engine of the inner loop is.

A new engine is one file with a class of this protocol, and one entry in :data:`metakern.inner_loop.engines.ENGINES`.
"""

from __future__ import annotations

from typing import ClassVar, Protocol

from torch import Tensor

from metakern.inner_loop.arguments import Call


class Unserved(Exception):
    """Why an engine does not serve a call.

    Attributes:
        cause: of a subclass, the reason without what the data alone decide: warnings come once per cause
    """

    cause: ClassVar[str] = ""


class Engine(Protocol):
    """One way to run inner loops.

    Engines are asked in their order, and the first that serves runs the call; the last is plain PyTorch. An engine
    must give a reason where plain PyTorch would be faster, as measured, unless the caller asks for it by name.

    Attributes:
        name: what messages call it
    """

    name: str

    def serves(self, call: Call) -> str | None:
        """Why it does not serve the call; None where it does. It may keep what it found out in ``call.prepared``."""
        ...

    def adapt(self, call: Call) -> dict[str, Tensor]:
        """Adapted parameters by name, [T, *shape] each, for a call that it serves.

        Raises:
            Unserved: for a reason that the run alone brings to light; the next engine is asked then
        """
        ...

    def meta_loss(self, call: Call) -> Tensor:
        """Query losses [T] for a call that it serves; raises as :meth:`adapt` does."""
        ...

    def meta_backward(self, call: Call, gradient: Tensor | None) -> Tensor | None:
        """Query losses [T], with meta-gradients added to ``grad`` without autograd; None where it has no such way.

        Args:
            call: one that it serves
            gradient: of what is minimised by the losses, [T]; None of their mean
        """
        ...

    def described(self, call: Call) -> str:
        """How it has served the call, for ``explain``."""
        ...

    def missed(self, call: Call, cause: str) -> None:
        """Another engine has served the call, as this one could not: warn, once per cause, if that costs much."""
        ...
