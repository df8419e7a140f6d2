"""Short one-line quotes of values and of other libraries' messages, for use in errors."""

from __future__ import annotations

import reprlib

#: Maximum characters of a quoted value, and of another library's message.
QUOTED = 80
MESSAGE = 300

#: Maximum bits of an integer shown in digits; conversion to decimal takes quadratic time.
_INTEGER_BITS = 256


class _Short(reprlib.Repr):
    """A repr whose length and cost do not grow with the value."""

    def __init__(self) -> None:
        super().__init__()
        self.maxlevel = 2
        self.maxlist = self.maxtuple = self.maxdict = self.maxset = self.maxfrozenset = 4
        self.maxstring = self.maxother = QUOTED - 20

    def repr_int(self, x: int, level: int) -> str:
        """A large integer is described by its size."""
        return repr(x) if x.bit_length() <= _INTEGER_BITS else f"<integer of {x.bit_length():,} bits>"


def shortened(text: str, limit: int = QUOTED) -> str:
    """At most ``limit`` characters; dots stand for the rest."""
    return text if len(text) <= limit else text[: limit - 3] + "..."


def quoted(value: object) -> str:
    """``repr(value)``, shortened to :data:`QUOTED` characters."""
    return shortened(_Short().repr(value))


def one_line(message: object) -> str:
    """A message joined to one line, shortened to :data:`MESSAGE` characters."""
    return shortened(" ".join(str(message).split()), MESSAGE)


def first_line(error: Exception) -> str:
    """An error's type and the first line of its message, shortened to :data:`MESSAGE` characters.

    Further lines of torch's errors describe torch's own source.
    """
    lines = str(error).splitlines() or [""]
    return f"{type(error).__name__}: {one_line(lines[0])}"
