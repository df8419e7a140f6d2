"""Saving and loading of rules: round trips without a network, and files that are damaged or not what they should be."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from metakern.core.checksum import digest
from metakern.rules import CoordinatewiseLSTM
from tests.conftest import assert_same_bits

OPTIONS: dict[str, Any] = {
    "hidden_size": 6,
    "num_layers": 3,
    "preprocess": "log_and_clip",
    "preprocess_scale": 5.0,
    "output_scale": 0.25,
}
CONFIG, WEIGHTS = "config.json", "model.safetensors"


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """No test here may reach for the network: the hub is told so, and sockets are closed."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError(f"a connection was attempted: {args}")

    monkeypatch.setattr("socket.socket.connect", refuse)


@pytest.fixture
def rule() -> CoordinatewiseLSTM:
    torch.manual_seed(3)
    return CoordinatewiseLSTM(**OPTIONS)


@pytest.fixture
def folder(rule: CoordinatewiseLSTM, tmp_path: Path) -> Iterator[Path]:
    """A folder with the saved rule."""
    rule.save_pretrained(tmp_path / "saved")
    yield tmp_path / "saved"
    shutil.rmtree(tmp_path)


def load(folder: Path) -> CoordinatewiseLSTM:
    return CoordinatewiseLSTM.from_pretrained(str(folder))


def rewrite_weights(folder: Path, change: dict[str, Any] | None = None, **metadata: str | None) -> None:
    """Write the weights file again with other tensors or metadata; a metadata value of None is left out."""
    kept: dict[str, str | None] = {"format": "pt", "metakern_format": "1", "rule": "CoordinatewiseLSTM"}
    tensors = load_file(folder / WEIGHTS) | (change or {})
    tensors = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    kept |= {"sha256": digest(tensors), **metadata}
    save_file(tensors, folder / WEIGHTS, metadata={k: v for k, v in kept.items() if v is not None})


# -------------------------------------------------------------------------------------------------- round trips


def test_a_saved_rule_comes_back_with_its_options_and_bits(rule: CoordinatewiseLSTM, folder: Path) -> None:
    loaded = load(folder)
    assert repr(loaded) == repr(rule)
    assert not loaded.training
    for name, tensor in rule.state_dict().items():
        assert_same_bits(name, loaded.state_dict()[name], tensor)
    params = torch.randn(37)
    expected, _ = rule(params, params, rule.init_state(params))
    got, _ = loaded(params, params, loaded.init_state(params))
    assert_same_bits("new params", got.detach(), expected.detach())


def test_saving_again_gives_the_same_contents(folder: Path, tmp_path: Path) -> None:
    load(folder).save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / CONFIG).read_bytes() == (folder / CONFIG).read_bytes()
    tensors, again = load_file(folder / WEIGHTS), load_file(tmp_path / "again" / WEIGHTS)
    assert list(tensors) == list(again)
    for name, tensor in tensors.items():
        assert_same_bits(name, again[name], tensor)


def test_files_are_those_of_the_hub(folder: Path) -> None:
    assert {CONFIG, WEIGHTS} <= {path.name for path in folder.iterdir()}
    config = json.loads((folder / CONFIG).read_text())
    unset = {"backend": None, "precision": "highest", "bfloat16_state": False, "horizon": None, "trained_on": None}
    assert config == OPTIONS | unset


def test_a_rule_from_modules_can_be_saved(tmp_path: Path) -> None:
    lstm, head = torch.nn.LSTM(1, 7, 1), torch.nn.Linear(7, 1)
    rule = CoordinatewiseLSTM.from_modules(lstm, head, preprocess="none", output_scale=1.0)
    rule.save_pretrained(tmp_path)
    loaded = load(tmp_path)
    assert repr(loaded) == repr(rule)
    assert_same_bits("head.weight", loaded.head.weight.detach(), head.weight.detach())


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_a_rule_of_another_dtype_keeps_its_bits(dtype: torch.dtype, tmp_path: Path) -> None:
    torch.manual_seed(3)
    rule = CoordinatewiseLSTM.from_modules(torch.nn.LSTM(2, 6, dtype=dtype), torch.nn.Linear(6, 1, dtype=dtype))
    expected = {name: tensor.clone() for name, tensor in rule.state_dict().items()}
    with torch.no_grad():  # a weight that float32 cannot hold
        rule.head.weight.fill_(1 / 3)
        expected["head.weight"] = rule.head.weight.clone()
    rule.save_pretrained(tmp_path)
    loaded = load(tmp_path)
    for name, tensor in expected.items():
        assert_same_bits(name, loaded.state_dict()[name], tensor)


def test_an_option_given_at_loading_wins(folder: Path) -> None:
    assert CoordinatewiseLSTM.from_pretrained(str(folder), backend="reference").backend == "reference"


def test_a_pretrained_name_that_does_not_ship_is_refused() -> None:
    with pytest.raises(ValueError, match=r"pretrained rule must be one of .*, got 'no such rule'"):
        CoordinatewiseLSTM.pretrained("no such rule")


# ----------------------------------------------------------------------------------------------- damaged files


def assert_refused(folder: Path, name: str, *parts: str) -> None:
    """Loading raises a ValueError that names the file, and says what was expected and what came."""
    with pytest.raises(ValueError) as caught:  # noqa: PT011 (the message is checked below)
        load(folder)
    message = str(caught.value)
    for part in (str(folder / name), *parts):
        assert part in message, f"{part!r} is not in {message!r}"


def test_weights_cut_off_anywhere_are_refused(folder: Path) -> None:
    whole = (folder / WEIGHTS).read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    cuts = {0, 1, 7, 8, 9, header // 2, header - 1, header, header + 1, len(whole) // 2, len(whole) - 4, len(whole) - 1}
    cuts |= set(range(0, len(whole), 997))
    for cut in sorted(cuts):
        (folder / WEIGHTS).write_bytes(whole[:cut])
        assert_refused(folder, WEIGHTS, "truncated, damaged or not a safetensors file")


def test_every_flipped_byte_of_the_header_is_refused_or_harmless(rule: CoordinatewiseLSTM, folder: Path) -> None:
    whole = (folder / WEIGHTS).read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    refused = 0
    for at in [*range(8), *range(8, header, 3)]:
        flipped = bytearray(whole)
        flipped[at] ^= 0x15
        (folder / WEIGHTS).write_bytes(bytes(flipped))
        try:
            loaded = load(folder)
        except ValueError as error:
            refused += 1
            assert str(folder / WEIGHTS) in str(error)  # noqa: PT017 (either outcome is sound)
            continue
        for name, tensor in rule.state_dict().items():  # a byte of the free metadata or of the padding
            assert_same_bits(f"{name} with byte {at} flipped", loaded.state_dict()[name], tensor)
    assert refused > 100


def test_every_flipped_byte_of_the_numbers_is_refused(folder: Path) -> None:
    whole = (folder / WEIGHTS).read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    for at in [*range(header, len(whole), 97), len(whole) - 1]:
        flipped = bytearray(whole)
        flipped[at] ^= 0x15
        (folder / WEIGHTS).write_bytes(bytes(flipped))
        assert_refused(folder, WEIGHTS, "is damaged: its tensors have another SHA-256 than it says")


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", b"\x80\x02}q\x00.", b"{}", b"\0" * 4096])
def test_weights_that_are_no_checkpoint_are_refused(content: bytes, folder: Path) -> None:
    (folder / WEIGHTS).write_bytes(content)
    assert_refused(folder, WEIGHTS, "truncated, damaged or not a safetensors file")


def test_missing_weights_are_named(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    with pytest.raises(ValueError, match=rf"{re.escape(str(folder))}.*lacks model\.safetensors"):
        load(folder)


def test_weights_of_another_rule_or_format_are_refused(folder: Path) -> None:
    rewrite_weights(folder, metakern_format="2")
    assert_refused(folder, WEIGHTS, "metakern_format '1'", "got '2'")
    rewrite_weights(folder, metakern_format=None)
    assert_refused(folder, WEIGHTS, "metakern_format '1'", "got None")
    rewrite_weights(folder, rule="RNNProp")
    assert_refused(folder, WEIGHTS, "rule 'CoordinatewiseLSTM'", "got 'RNNProp'")
    rewrite_weights(folder)
    load(folder)


def test_weights_that_do_not_fit_the_config_are_refused(folder: Path) -> None:
    rewrite_weights(folder, {"head.bias": None})
    assert_refused(folder, WEIGHTS, "head.bias")
    rewrite_weights(folder, {"head.bias": torch.zeros(1), "extra": torch.zeros(1)})
    assert_refused(folder, WEIGHTS, "extra")
    rewrite_weights(folder, {"extra": None, "head.bias": torch.zeros(2)})
    assert_refused(folder, WEIGHTS, "head.bias")


# ------------------------------------------------------------------------------------------------------ config


@pytest.mark.parametrize("change", [{"hidden_size": 7}, {"num_layers": 2}, {"preprocess": "none"}])
def test_a_config_that_does_not_match_the_weights_is_refused(change: dict[str, Any], folder: Path) -> None:
    (folder / CONFIG).write_text(json.dumps(OPTIONS | change))
    assert_refused(folder, WEIGHTS, "config.json")


@pytest.mark.parametrize("content", ["", '{"hidden_size": 6, "num_', "[1, 2]", "not json", "\0\0"])
def test_a_config_that_is_damaged_is_refused(content: str, folder: Path) -> None:
    (folder / CONFIG).write_text(content)
    assert_refused(folder, CONFIG)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_size": 65}, "hidden_size must be 1 to 64, got 65"),
        ({"hidden_size": "6"}, "hidden_size must be an integer, got '6' of type str"),
        ({"preprocess": "log"}, "preprocess must be one of none, log_sign, log_and_clip, got 'log'"),
        ({"output_scale": float("nan")}, "output_scale must be finite in float32, got nan"),
    ],
)
def test_a_config_with_options_out_of_range_is_refused(change: dict[str, Any], message: str, folder: Path) -> None:
    (folder / CONFIG).write_text(json.dumps(OPTIONS | change))
    assert_refused(folder, CONFIG, message)


def test_a_missing_config_is_named(folder: Path) -> None:
    # The default options would load and then take other steps than the rule that was saved.
    (folder / CONFIG).unlink()
    with pytest.raises(ValueError, match=rf"{re.escape(str(folder))}.*lacks config\.json"):
        load(folder)


def test_a_config_that_lost_an_option_is_refused(folder: Path) -> None:
    for name in ("preprocess_scale", "output_scale"):
        (folder / CONFIG).write_text(json.dumps({k: v for k, v in OPTIONS.items() if k != name}))
        assert_refused(folder, CONFIG, name)


@pytest.mark.parametrize("name", ["./nowhere", "/nowhere/rule", "runs/some/rule", Path("nowhere")])
def test_a_path_that_is_no_folder_is_not_looked_for_on_the_hub(name: str | Path) -> None:
    with pytest.raises(ValueError, match="is not a folder"):
        CoordinatewiseLSTM.from_pretrained(name)
