"""Hostile files of plain data are refused at once, in one short line."""

import json
import time

import pytest

from metakern.core.plain_data import LIST_ENTRIES, check_flat, parse_json, parse_yaml, read_json, read_text
from metakern.rules import CoordinatewiseLSTM
from metakern.runs.folder import read_config
from metakern.runs.metrics import read_metrics
from tests.cli.commands import invoke


def laughs(levels, width=9):
    """Nested aliases: a few hundred bytes that stand for ``width`` to the power of ``levels`` entries."""
    lines = ["a0: &a0 [lol]"]
    lines += [f"a{level}: &a{level} [{', '.join([f'*a{level - 1}'] * width)}]" for level in range(1, levels)]
    return "\n".join(lines) + "\n"


HOSTILE = {
    "aliases": (laughs(8), "it must have no anchors and aliases, got 'a0'"),
    "alias of itself": ("a: &x [*x]\n", "no anchors and aliases, got 'x'"),
    "merge keys": ("a: &x {b: 1}\n<<: *x\n", "no anchors and aliases"),
    "deep flow lists": ("a: " + "[" * 30_000, "got deeper nesting"),
    "deep flow mappings": ("a: " + "{a: " * 7_000, "got deeper nesting"),
    "deep blocks": ("".join(" " * depth + "a:\n" for depth in range(200)), "got deeper nesting"),
    "nested settings": ("a: {b: [1]}\n", "got deeper nesting"),
    "mapping as value": ("a: {b: 1}\n", "'a' must be a number, text or a list of these"),
    "long list": ("a: [" + "1, " * 200 + "1]\n", f"'a' must be a list of at most {LIST_ENTRIES} entries, got 201"),
    "huge integer": ("a: " + "9" * 30_000, "integer"),
    "huge hexadecimal integer": ("a: 0x" + "f" * 30_000, "'a' must hold integers of at most 64 bits, got <integer of"),
    "long text": ("a: " + "x" * 30_000 + "\n", "'a' must be text of at most 4,096 characters, got 30,000"),
    "no number": ("a: !!float " + "x" * 30_000 + "\n", "it is not YAML: could not convert string to float"),
    "no time": ("a: !!timestamp x\n", "it is not YAML"),
    "date": ("a: 2020-01-01\n", "'a' must be a number, text or a list of these"),
    "number as name": ("1: 2\n", "settings must be named by text, got 1"),
    "large file": ("# " + "x" * 70_000 + "\n", "it must be at most 32,768 bytes, got more"),
    "open quotes": ('a: "' + "x" * 30_000, "it is not YAML"),
    "long tag": ("a: !" + "x" * 30_000 + " 1\n", "it is not YAML"),
    "many settings": ("".join(f"s{i}: 1\n" for i in range(3000)), None),
    "many colons": ("a: " + "1:" * 15_000 + "1\n", None),
    "control characters": ("a: \x00\x1b[31m\n", "it is not YAML"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_configuration_is_refused_within_a_second_in_one_line(name, tmp_path):
    text, message = HOSTILE[name]
    path = tmp_path / "config.yaml"
    path.write_text(text)
    start = time.process_time()
    try:
        read_config(path, "maml")
    except ValueError as error:
        said = str(error)
        assert message is None or message in said, said
        assert "\n" not in said
        assert len(said) < 400 + len(str(path))
    else:
        assert message is None
    assert time.process_time() - start < 1


@pytest.mark.parametrize("name", ["aliases", "deep flow lists", "many settings", "huge hexadecimal integer"])
def test_a_command_says_one_short_line(name, tmp_path):
    (tmp_path / "config.yaml").write_text(HOSTILE[name][0])
    start = time.process_time()
    result = invoke(f"train maml --config {tmp_path}/config.yaml --output {tmp_path}/run")
    assert result.exit_code == 1
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: configuration ")
    assert len(line) < 1500  # the settings that there are
    assert time.process_time() - start < 2
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("setting", ["tasks", "device", "hidden", "clusters", "optimizer", "mixed_precision"])
def test_errors_quote_little_of_a_setting(setting, tmp_path):
    (tmp_path / "config.yaml").write_text(f"{setting}: {'x' * 4000}\n")
    result = invoke(f"train maml --config {tmp_path}/config.yaml --output {tmp_path}/run")
    assert result.exit_code == 1
    (line,) = result.stderr.splitlines()
    assert setting in line
    assert len(line) < 400


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[" * 100_000, "nested too deeply|char|delimiter"),
        ('{"a":' * 5000 + "1" + "}" * 5000, "nested too deeply"),
        ("9" * 5000, "integers must have at most 64 bits, got one of 5,000 digits"),
        ("{" + '"a": 1, ' * 3, "Expecting property name"),
    ],
)
def test_hostile_json_is_a_value_error_of_one_short_line(text, message):
    with pytest.raises(ValueError, match=message) as caught:
        parse_json(text)
    assert len(str(caught.value)) < 300
    assert "\n" not in str(caught.value)


def test_files_are_read_up_to_their_limit(tmp_path):
    path = tmp_path / "a.json"
    path.write_text(json.dumps("x" * 100))
    assert read_json(path) == "x" * 100
    with pytest.raises(ValueError, match="at most 50 bytes, got more"):
        read_json(path, 50)
    path.write_bytes(b"\xff")
    with pytest.raises(ValueError, match="UTF-8"):
        read_text(path, 50)
    start = time.process_time()
    with open("/dev/zero", "rb"), pytest.raises(ValueError, match="at most"):
        read_config(type(path)("/dev/zero"), "maml")
    assert time.process_time() - start < 1


def test_what_a_configuration_holds_is_read():
    text = "a: 1\nb: 1.5\nc: x\nd: null\ne: true\nf: [1, x, 2.5]\ng: 1e-3\n"
    expected = {"a": 1, "b": 1.5, "c": "x", "d": None, "e": True, "f": [1, "x", 2.5], "g": "1e-3"}
    assert check_flat(parse_yaml(text)) == expected


def test_metrics_end_at_the_first_line_that_is_none(tmp_path):
    good = '{"iteration": 1, "loss": 0.5}\n'
    path = tmp_path / "metrics.jsonl"
    for bad in (
        "[" * 50_000, '{"iteration": ' + "9" * 5000 + "}", "[1]", '{"iteration": "x"}', '{"loss": 1}',
        '{"iteration": 2, "x": "' + "y" * 100_000 + '"}', "\x00",
    ):  # fmt: skip
        path.write_text(good + bad + "\n" + good)
        assert read_metrics(path) == ([{"iteration": 1, "loss": 0.5}], [])


def test_the_config_of_a_rule_is_refused_where_it_is_hostile(tmp_path):
    CoordinatewiseLSTM(4, 1).save_pretrained(tmp_path)
    content = json.loads((tmp_path / "config.json").read_text())
    for text, message in (
        ('{"a":' * 5000 + "1" + "}" * 5000, "nested too deeply"),
        (json.dumps(content | {"hidden_size": [[1]]}), "must be a number, text or a list of these"),
        (json.dumps(content)[:-1] + ', "x": ' + "9" * 5000 + "}", "at most 64 bits"),
        (" " * 100_000, "at most 32,768 bytes"),
    ):
        (tmp_path / "config.json").write_text(text)
        start = time.process_time()
        with pytest.raises(ValueError, match=rf"config\.json.*{message}") as caught:
            CoordinatewiseLSTM.from_pretrained(tmp_path)
        assert len(str(caught.value)) < 300 + len(str(tmp_path))
        assert time.process_time() - start < 1
