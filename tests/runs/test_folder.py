"""A run's folder: checked before the work, files written atomically, configuration round trips."""

import json
import math
import os

import pytest
import torch
from safetensors.torch import save_file

from metakern.models import mlp
from metakern.runs.folder import (
    default_folder,
    load_weights,
    make_folder,
    newest_folder,
    open_folder,
    read_config,
    save_weights,
    write_config,
    write_environment,
    write_json,
    write_text,
)
from metakern.training import FolderLock


def test_a_folder_that_holds_a_run_is_not_written_over(tmp_path):
    open_folder(tmp_path / "run")
    write_config(tmp_path / "run", "maml", {})
    write_text(tmp_path / "run" / "checkpoints" / "00000001.pt", "")
    with pytest.raises(ValueError, match="holds a run already: --resume continues it, --overwrite replaces it"):
        open_folder(tmp_path / "run")
    open_folder(tmp_path / "run", resume=True)
    assert (tmp_path / "run" / "config.yaml").is_file()


def test_overwriting_removes_what_a_run_wrote_and_nothing_else(tmp_path):
    write_config(tmp_path, "maml", {})
    written = (
        "metrics.jsonl",
        "curves.png",
        "figures/learning.png",
        "checkpoints/00000100.pt",
        "checkpoints/00000100.sha256",
    )
    for name in (*written, "notes.txt", "figures/mine.svg"):
        write_text(tmp_path / name, "")
    open_folder(tmp_path, overwrite=True)
    left = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
    assert left == {"notes.txt", "figures/mine.svg"}


@pytest.mark.parametrize("kept", ["checkpoints/00000100.pt", "model.safetensors"])
def test_a_run_without_checkpoint_and_weights_can_be_begun_again(tmp_path, kept):
    """It was refused, or diverged, before its first checkpoint; what it left is removed."""
    write_config(tmp_path, "maml", {})
    for name in ("metrics.jsonl", "environment.json", "notes.txt"):
        write_text(tmp_path / name, "")
    open_folder(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]
    write_text(tmp_path / kept, "")
    with pytest.raises(ValueError, match="holds a run already"):
        open_folder(tmp_path)


def test_a_second_run_has_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert str(default_folder("maml")) == str(newest_folder("maml")) == "runs/maml"
    for number, name in enumerate(("maml", "maml-2", "maml-3"), 2):
        write_config(tmp_path / "runs" / name, "maml", {})
        assert str(default_folder("maml")) == f"runs/{name}"  # it holds no checkpoint
        write_text(tmp_path / "runs" / name / "checkpoints" / "00000001.pt", "")
        assert str(default_folder("maml")) == f"runs/maml-{number}"
        assert str(newest_folder("maml")) == f"runs/{name}"
    with FolderLock(tmp_path / "runs" / "maml-4"):
        assert str(default_folder("maml")) == "runs/maml-5"


def test_there_must_be_a_run_to_resume(tmp_path):
    with pytest.raises(ValueError, match=r"empty holds no run to resume: it has no config\.yaml"):
        open_folder(tmp_path / "empty", resume=True)
    assert not (tmp_path / "empty").exists()


def test_a_folder_that_cannot_be_made_is_named_with_the_reason(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"folder .*file/run cannot be written: Not a directory"):
        make_folder(tmp_path / "file" / "run")


def test_a_file_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    write_text(tmp_path / "a", "old")

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left on device"):
        write_text(tmp_path / "a", "new")
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    assert (tmp_path / "a").read_text() == "old"


def test_a_configuration_comes_back_as_it_was(tmp_path):
    settings = {"tasks": "sinusoid", "lr": 0.001, "patience": None, "hidden": "40,40", "first_order": False}
    write_config(tmp_path, "maml", settings)
    assert read_config(tmp_path / "config.yaml", "maml") == settings
    head = f"# metakern train maml --config {tmp_path}/config.yaml --output FOLDER repeats this run in another folder"
    assert (tmp_path / "config.yaml").read_text().startswith(head)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("learner: optimizer\n", r"config\.yaml must be of learner 'maml', got 'optimizer'"),
        ("- a\n- b\n", r"config\.yaml: it must map settings to values, got list"),
        ("a: [1\n", r"config\.yaml: it is not YAML: while parsing"),
        ("a: !!python/object/apply:os.getcwd []\n", r"config\.yaml: it is not YAML: could not determine a constructor"),
        (b"\xff\xfe\x00", r"config\.yaml cannot be read"),
    ],
)
def test_a_configuration_that_is_none_is_named(tmp_path, text, message):
    (tmp_path / "config.yaml").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError, match=message):
        read_config(tmp_path / "config.yaml", "maml")


def test_a_missing_configuration_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"configuration .*nowhere\.yaml cannot be read: No such file or directory"):
        read_config(tmp_path / "nowhere.yaml", "maml")


def test_json_says_what_made_it_and_has_null_for_what_is_not_finite(tmp_path):
    write_json(tmp_path / "a.json", {"losses": [1.0, math.inf], "best": math.nan})
    content = json.loads((tmp_path / "a.json").read_text())
    assert content["losses"] == [1.0, None]
    assert content["best"] is None
    assert content["environment"]["torch"] == torch.__version__
    assert content["command"].split()[0] == "metakern"


def test_the_environment_names_versions_threads_and_processes(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    write_environment(tmp_path)
    content = json.loads((tmp_path / "environment.json").read_text())
    assert content["packages"]["scikit-learn"]
    assert content["environment"]["threads"] == torch.get_num_threads()
    assert content["processes"] == 3
    assert content["date"].startswith("20")


def test_weights_come_back_with_the_same_bits(tmp_path):
    net, other = mlp(2, 3, 1), mlp(2, 3, 1)
    save_weights(tmp_path, net)
    load_weights(tmp_path, other)
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), other.parameters(), strict=True))


def test_weights_that_are_missing_damaged_or_of_another_model_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"holds no trained learner: it has no model\.safetensors"):
        load_weights(tmp_path, mlp(2, 3, 1))
    save_weights(tmp_path, mlp(2, 3, 1))
    with pytest.raises(ValueError, match=r"does not hold the weights that config\.yaml describes: .*size mismatch"):
        load_weights(tmp_path, mlp(2, 4, 1))
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(ValueError, match="is truncated, damaged or not a safetensors file"):
        load_weights(tmp_path, mlp(2, 3, 1))


def test_no_damage_of_weights_loads_in_silence(tmp_path):
    """A byte changed anywhere is an error, or the file holds the same weights still."""
    net = mlp(3, 5, 2)
    save_weights(tmp_path, net)
    path = tmp_path / "model.safetensors"
    whole = path.read_bytes()
    places = torch.randint(len(whole), (200,), generator=torch.Generator().manual_seed(0)).tolist()
    refused = 0
    for place in [*places, len(whole) - 1]:
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 0x10]) + whole[place + 1 :])
        other = mlp(3, 5, 2)
        try:
            load_weights(tmp_path, other)
        except ValueError:
            refused += 1
        else:
            assert all(map(torch.equal, other.parameters(), net.parameters())), f"byte {place}"
            assert place < len(whole) - 32 * 4, "the numbers themselves"
    assert refused > 100
    with pytest.raises(ValueError, match="is damaged: its tensors have another SHA-256 than it says"):
        load_weights(tmp_path, mlp(3, 5, 2))


def test_weights_without_a_digest_are_refused(tmp_path):
    net = mlp(2, 3, 1)
    save_file(net.state_dict(), tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="must have a sha256 of its tensors in its metadata, got none"):
        load_weights(tmp_path, net)
