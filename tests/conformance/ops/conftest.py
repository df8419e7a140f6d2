"""Fixture that activates the implementation under test."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.conformance.ops.implementations import Implementation


@pytest.fixture
def by(request: pytest.FixtureRequest) -> Iterator[Implementation]:
    """The implementation of an indirect parameter; skips if this machine cannot run it."""
    implementation: Implementation = request.param
    with implementation.in_use():
        if implementation.kind == "interpreted":
            request.getfixturevalue("interpreter_like_a_gpu")
            request.getfixturevalue("quick_interpreter")
        yield implementation
