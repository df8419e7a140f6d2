"""Fixture with the task distribution under test."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.conformance.tasks.rows import Row


@pytest.fixture
def tasks(row: Row, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    return row.make(tmp_path, monkeypatch)
