"""from_pretrained: invalid weights and options, lookup of names, and model cards."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from metakern.core.plain_data import CONFIG_BYTES
from metakern.rules import CoordinatewiseLSTM
from tests.rules.test_pretrained import CONFIG, OPTIONS, WEIGHTS, assert_refused, load, rewrite_weights
from tests.rules.test_pretrained import folder as folder  # fixtures
from tests.rules.test_pretrained import no_network as no_network
from tests.rules.test_pretrained import rule as rule

CARD = "README.md"


# ------------------------------------------------------------------------------------------------------------- weights


@pytest.mark.parametrize("dtype", [torch.int32, torch.uint8, torch.bool, torch.complex64, torch.float8_e5m2], ids=str)
def test_weights_of_another_dtype_are_refused(dtype: torch.dtype, folder: Path) -> None:
    tensors = load_file(folder / WEIGHTS)
    rewrite_weights(folder, {"head.bias": tensors["head.bias"].to(dtype)})
    assert_refused(folder, WEIGHTS, f"got {dtype} for head.bias")
    rewrite_weights(folder, {name: tensor.to(dtype) for name, tensor in tensors.items()})
    assert_refused(folder, WEIGHTS, f"got {dtype} for ")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_weights_that_are_not_finite_are_refused(value: float, dtype: torch.dtype, folder: Path) -> None:
    tensors = {name: tensor.to(dtype) for name, tensor in load_file(folder / WEIGHTS).items()}
    tensors["lstm.weight_hh_l1"][3, 2] = value
    rewrite_weights(folder, tensors)
    assert_refused(folder, WEIGHTS, "must have finite weights, got NaN or infinity in lstm.weight_hh_l1")


def test_weights_of_several_dtypes_are_refused(folder: Path) -> None:
    rewrite_weights(folder, {"head.bias": torch.zeros(1, dtype=torch.float64)})
    assert_refused(folder, WEIGHTS, "one dtype, got torch.float32, torch.float64")


def test_a_rule_that_could_not_be_loaded_is_not_saved(rule: CoordinatewiseLSTM, tmp_path: Path) -> None:
    rule.head.weight.data[0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"the rule must have finite weights, got NaN or infinity in head.weight"):
        rule.save_pretrained(tmp_path / "broken")


# ------------------------------------------------------------------------------------------------------------- options

#: For every option, values of other types, and how the message calls what it should be.
WRONG: dict[str, tuple[list[Any], str]] = {
    "hidden_size": (["6", 6.0, True, None, [6]], "an integer"),
    "num_layers": (["3", 3.5, False, []], "an integer"),
    "preprocess": ([1, None, True, ["log_sign"]], "a text"),
    "preprocess_scale": (["5", True, None, [5.0]], "a number"),
    "output_scale": (["0.25", False, None, []], "a number"),
    "backend": ([1, False, ["cpp"]], "a text or null"),
    "precision": ([1, None, []], "a text"),
    "bfloat16_state": (["yes", 1, 0, None, "false"], "true or false"),
    "horizon": (["100", 1.5, True, [1]], "an integer or null"),
    "trained_on": ([1, True, ["digits"]], "a text or null"),
}


def test_every_option_is_checked() -> None:
    assert set(WRONG) == CoordinatewiseLSTM.option_types().keys()


@pytest.mark.parametrize("name", WRONG)
def test_options_of_another_type_are_refused(name: str, folder: Path) -> None:
    values, kind = WRONG[name]
    for value in values:
        (folder / CONFIG).write_text(json.dumps(OPTIONS | {name: value}))
        assert_refused(folder, CONFIG, f"{name} must be {kind}, got", f"of type {type(value).__name__}")


@pytest.mark.parametrize("name", WRONG)
def test_nested_options_are_refused(name: str, folder: Path) -> None:
    (folder / CONFIG).write_text(json.dumps(OPTIONS | {name: {"a": 1}}))
    assert_refused(folder, CONFIG, f"'{name}' must be a number, text or a list of these")


@pytest.mark.parametrize("options", [{"bfloat16_state": "yes"}, {"horizon": 1.5}, {"horizon": True}, {"trained_on": 3}])
def test_the_constructor_checks_them_too(options: dict[str, Any]) -> None:
    with pytest.raises(TypeError, match=f"{next(iter(options))} must be"):
        CoordinatewiseLSTM(**options)


@pytest.mark.parametrize(("name", "value"), [("horizon", 0), ("precision", "low"), ("backend", "gpu")])
def test_options_out_of_range_are_refused(name: str, value: Any, folder: Path) -> None:
    (folder / CONFIG).write_text(json.dumps(OPTIONS | {name: value}))
    assert_refused(folder, CONFIG, f"{name} must be")


def test_an_unknown_option_is_refused(folder: Path) -> None:
    (folder / CONFIG).write_text(json.dumps(OPTIONS | {"momentum": 0.9}))
    assert_refused(folder, CONFIG, "alone, got 'momentum'")


@pytest.mark.parametrize(
    "content",
    ["[" * 60_000, '{"hidden_size": ' + "9" * 5000 + "}", json.dumps(OPTIONS) + " " * CONFIG_BYTES],
    ids=["deep", "digits", "long"],
)
def test_a_config_that_would_take_long_is_refused_in_a_line(content: str, folder: Path) -> None:
    (folder / CONFIG).write_text(content)
    with pytest.raises(ValueError, match=CONFIG) as caught:
        load(folder)
    assert len(str(caught.value)) < 500


def test_messages_shorten_what_they_quote(folder: Path) -> None:
    for change in ({"precision": [["x" * 100] * 100]}, {"y" * 10_000: 1}):
        (folder / CONFIG).write_text(json.dumps(OPTIONS | change))
        with pytest.raises(ValueError, match=CONFIG) as caught:
            load(folder)
        assert len(str(caught.value)) < 600
    (folder / CONFIG).write_text(json.dumps({f"option {i}": i for i in range(2000)}))
    with pytest.raises(ValueError, match=CONFIG) as caught:
        load(folder)
    assert len(str(caught.value)) < 600


# --------------------------------------------------------------------------------------------------------------- names


def test_what_ships_is_found_without_the_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError(f"the network was asked: {args}")

    monkeypatch.setattr("huggingface_hub.snapshot_download", refuse)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "digits_lstm").mkdir()  # a folder of that name that holds no rule
    found, shipped = CoordinatewiseLSTM.from_pretrained("digits_lstm"), CoordinatewiseLSTM.pretrained("digits_lstm")
    assert torch.equal(found.head.weight, shipped.head.weight)
    assert found.horizon == shipped.horizon == 100
    assert CoordinatewiseLSTM.from_pretrained("digits_lstm", backend="reference").backend == "reference"
    with pytest.raises(ValueError, match=r"one of .*digits_lstm, .*, which ship .* got 'digits_lsmt'"):
        CoordinatewiseLSTM.from_pretrained("digits_lsmt")


def test_a_folder_of_the_name_of_a_rule_that_ships(
    rule: CoordinatewiseLSTM, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    rule.save_pretrained("digits_lstm")
    assert CoordinatewiseLSTM.from_pretrained("digits_lstm").hidden_size == rule.hidden_size
    assert CoordinatewiseLSTM.pretrained("digits_lstm").hidden_size == 20


def test_names_of_the_hub_are_fetched_and_checked_as_folders(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def fetch(name: str, **options: Any) -> str:
        asked.append((name, options))
        return str(folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", fetch)
    assert CoordinatewiseLSTM.from_pretrained("someone/rule", revision="v2", token=False).hidden_size == 6
    assert asked == [("someone/rule", {"allow_patterns": [CONFIG, WEIGHTS], "revision": "v2", "token": False})]
    (folder / CONFIG).unlink()
    with pytest.raises(ValueError, match=r"lacks config\.json"):
        CoordinatewiseLSTM.from_pretrained("someone/rule")


@pytest.mark.parametrize("call", ["push_to_hub", "save_pretrained"])
def test_a_rule_is_uploaded_as_it_is_saved(
    call: str, rule: CoordinatewiseLSTM, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []

    class Api:
        def __init__(self, token: Any) -> None:
            asked.append(token)

        def create_repo(self, **options: Any) -> Any:
            asked.append(options)
            return SimpleNamespace(repo_id="someone/rule")

        def upload_folder(self, folder_path: str, **options: Any) -> str:
            options |= {path.name: path.read_bytes() for path in Path(folder_path).iterdir()}
            assert options.pop(WEIGHTS)
            asked.append(options)
            return "https://nowhere/commit"

    monkeypatch.setattr("huggingface_hub.HfApi", Api)
    options: dict[str, Any] = {"token": "secret", "branch": "dev", "commit_message": "words", "create_pr": True}
    if call == "push_to_hub":
        url = rule.push_to_hub("rule", **options)
    else:
        url = rule.save_pretrained(folder, push_to_hub=True, repo_id="rule", **options)
    assert url == "https://nowhere/commit"
    files = {name: (folder / name).read_bytes() for name in (CONFIG, CARD)}
    wanted = {"repo_id": "someone/rule", "revision": "dev", "commit_message": "words", "create_pr": True}
    assert asked == ["secret", {"repo_id": "rule", "private": None, "exist_ok": True}, wanted | files]


def test_options_of_the_upload_need_an_upload(rule: CoordinatewiseLSTM, tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"\['private'\] need push_to_hub=True"):
        rule.save_pretrained(tmp_path, private=True)
    with pytest.raises(TypeError, match=r"options of CoordinatewiseLSTM are .*, got \['momentum'\]"):
        CoordinatewiseLSTM.from_pretrained("digits_lstm", momentum=0.9)


# --------------------------------------------------------------------------------------------------------- model cards


def test_a_card_says_what_the_rule_is_and_what_is_not_known(folder: Path) -> None:
    card = (folder / CARD).read_text()
    assert "3 layers of 6 units" in card
    assert "`preprocess='log_and_clip'`" in card
    assert "It is not recorded what this rule was meta-trained on" in card
    assert "not recorded for how many steps" in card
    assert "`digits_lstm` wants 0.03 to 0.3" in card  # what is measured of it is not said of others
    assert "pushed" not in card
    assert "More Information Needed" not in card
    assert str(CoordinatewiseLSTM.from_pretrained(folder).generate_model_card()) == card


def test_a_card_says_what_is_known(tmp_path: Path) -> None:
    rule = CoordinatewiseLSTM(4, 1, horizon=30, trained_on="rings of 5 points")
    rule.save_pretrained(tmp_path)
    card = (tmp_path / CARD).read_text()
    assert "Meta-trained on rings of 5 points. Its episodes had 30 steps." in card
    assert "warns once after step 30" in card
    assert "not recorded" not in card
    loaded = load(tmp_path)
    assert (loaded.horizon, loaded.trained_on) == (30, "rings of 5 points")


def test_cards_are_renewed_unless_they_are_the_users(rule: CoordinatewiseLSTM, folder: Path) -> None:
    other = CoordinatewiseLSTM(7, 1)
    other.save_pretrained(folder)
    assert "1 layer of 7 units" in (folder / CARD).read_text()
    (folder / CARD).write_text("my own words")
    rule.save_pretrained(folder)
    assert (folder / CARD).read_text() == "my own words"


def test_options_are_saved_as_they_are_now(rule: CoordinatewiseLSTM, tmp_path: Path) -> None:
    rule.horizon, rule.backend = 55, "reference"
    rule.save_pretrained(tmp_path)
    loaded = load(tmp_path)
    assert (loaded.horizon, loaded.backend) == (55, "reference")
    rule.head.weight.data.mul_(2)
    rule.save_pretrained(tmp_path)
    assert torch.equal(load(tmp_path).head.weight, rule.head.weight)


def test_code_of_a_card_runs(folder: Path) -> None:
    card = (folder / CARD).read_text()
    code = card.split("```python\n")[1].split("```")[0].replace("path/to/this/folder", str(folder))
    model = torch.nn.Linear(2, 1)
    names: dict[str, Any] = {"model": model}
    exec(code, names)
    model(torch.ones(1, 2)).sum().backward()
    names["optimizer"].step()
