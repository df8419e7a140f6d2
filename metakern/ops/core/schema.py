"""An operator's arguments and results by name, read from its schema."""

from __future__ import annotations

from collections import namedtuple
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from metakern.core.torch_private import parse_schema

#: Whether an argument or result is a list of tensors, by torch's name of its type.
_TENSORS = {"Tensor": False, "Optional[Tensor]": False, "List[Tensor]": True}


class Place(NamedTuple):
    """An argument or a result that holds tensors."""

    name: str
    position: int
    is_list: bool


class Schema:
    """An operator's schema, and named tuples for its arguments and results.

    Attributes:
        name: of the operator, without its namespace
        text: the declared schema
        Arguments: named tuple of the arguments, with the schema's defaults
        Results: named tuple of the results
        tensors: the arguments that hold tensors: one, one or None, or a list
        outputs: the results, all of which hold tensors
        mutated: names of the arguments that the operator writes to
    """

    def __init__(self, text: str, results: Sequence[str]) -> None:
        parsed = parse_schema(f"metakern::{text}")
        self.text, self.parsed = text, parsed
        self.name: str = parsed.name.partition("::")[2]
        names = [a.name for a in parsed.arguments]
        with_defaults = [a.default_value for a in parsed.arguments if a.has_default_value()]
        self.Arguments: Any = namedtuple(f"{self.name}_arguments", names, defaults=with_defaults)  # type: ignore[misc]
        kinds = [str(r.type) for r in parsed.returns]
        if len(results) != len(kinds) or any(kind not in _TENSORS for kind in kinds):
            raise ValueError(f"{self.name} returns {kinds}: results must name as many tensors, got {list(results)}")
        results_type: Any = namedtuple(f"{self.name}_results", results)  # type: ignore[misc]
        self.Results = results_type
        self.tensors = tuple(
            Place(a.name, index, _TENSORS[str(a.type)])
            for index, a in enumerate(parsed.arguments)
            if str(a.type) in _TENSORS
        )
        self.outputs = tuple(
            Place(name, index, _TENSORS[kind]) for index, (name, kind) in enumerate(zip(results, kinds, strict=True))
        )
        self.mutated = tuple(a.name for a in parsed.arguments if a.alias_info is not None and a.alias_info.is_write)

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the arguments, in order."""
        return tuple(self.Arguments._fields)

    def check_names(self, what: str, names: Iterable[str], among: Iterable[str]) -> None:
        """Raise ValueError for a name that is not in ``among``."""
        among = list(among)
        for name in names:
            if name not in among:
                raise ValueError(f"{what} of {self.name} must be among {', '.join(among)}, got {name!r}")

    def results_of(self, returned: Any) -> Sequence[Any]:
        """The results of a call as a sequence, whatever their number."""
        if len(self.outputs) == 1:
            return (returned,)
        return returned if self.outputs else ()


def signature(parsed: Any) -> tuple[Any, ...]:
    """A schema in comparable form, independent of alias names of mutated arguments."""
    arguments = [(a.name, str(a.type), a.alias_info is not None and a.alias_info.is_write) for a in parsed.arguments]
    return arguments, [str(r.type) for r in parsed.returns]


def flatten(values: Sequence[Any], places: Sequence[Place]) -> list[Tensor | None]:
    """The tensors of ``values`` one by one, in the order of ``places``."""
    flat: list[Tensor | None] = []
    for _, index, is_list in places:
        if is_list:
            flat += values[index]
        else:
            flat.append(values[index])
    return flat


def put(flat: Sequence[Any], values: list[Any], places: Sequence[Place], lengths: Sequence[Any]) -> int:
    """Put the tensors of ``flat`` back into ``values``, the inverse of :func:`flatten`; returns their number.

    ``lengths`` holds a sequence of the right length at the index of every list.
    """
    at = 0
    for _, index, is_list in places:
        if is_list:
            end = at + len(lengths[index])
            values[index] = list(flat[at:end])
            at = end
        else:
            values[index] = flat[at]
            at += 1
    return at


def without_tensors(values: Sequence[Any], places: Sequence[Place]) -> list[Any]:
    """The values with every tensor, also inside lists, replaced by None."""
    bare = list(values)
    for _, index, is_list in places:
        bare[index] = [None] * len(bare[index]) if is_list else None
    return bare
