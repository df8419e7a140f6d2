from __future__ import annotations

import pytest
import torch

from bench.peers import compile_peer


def test_compiled_peers_have_cache_entries_of_their_own_for_each_instruction_set(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    before = torch.compiler.config.cache_key_tag
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    with torch.compiler.config.patch(cache_key_tag=""):
        compile_peer(torch.sin)  # compiles nothing before the first call
        assert torch.compiler.config.cache_key_tag == "AVX2"
    assert torch.compiler.config.cache_key_tag == before
