"""The implementation that a test of the suite runs, in use."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.conformance.ops.implementations import Implementation


@pytest.fixture
def by(request: pytest.FixtureRequest) -> Iterator[Implementation]:
    """The implementation of an indirect parameter; skips where this machine has not what it takes."""
    implementation: Implementation = request.param
    with implementation.in_use():
        if implementation.kind == "interpreted":
            request.getfixturevalue("interpreter_like_a_gpu")
            request.getfixturevalue("quick_interpreter")
        yield implementation
