"""Files are written atomically, never through a link, and name conflicts are reported before the work."""

import os
import stat

import pytest
import torch

from metakern.core.files import check_targets, open_new, write_whole
from metakern.models import mlp
from metakern.rules import CoordinatewiseLSTM
from metakern.runs.folder import save_weights, write_config, write_json
from metakern.tasks._images import load_images
from metakern.training import Trainer, TrainerConfig
from tests.cli.commands import SINUSOID, invoke
from tests.training.problems import Learner, Lines, make_trainer

WRITERS = {
    "model.safetensors": lambda folder: save_weights(folder, mlp(1, 2, 1)),
    "config.yaml": lambda folder: write_config(folder, "maml", {}),
    "results.json": lambda folder: write_json(folder / "results.json", {}),
}

RULES = ("model.safetensors", "config.json", "README.md")


@pytest.fixture
def precious(tmp_path):
    file = tmp_path / "precious"
    file.write_text("mine")
    yield file
    assert file.read_text() == "mine"


def taken(path, precious, kind):
    """Occupy the name by a link or a directory."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if kind == "link":
        path.symlink_to(precious)
    else:
        path.mkdir()


KINDS = pytest.mark.parametrize(("kind", "word"), [("link", "a symbolic link"), ("directory", "a directory")])


@KINDS
@pytest.mark.parametrize("name", WRITERS)
def test_no_writer_goes_through_a_link_or_over_a_directory(name, kind, word, tmp_path, precious):
    path = tmp_path / "run" / name
    taken(path, precious, kind)
    with pytest.raises(OSError, match=rf"a file is to be written where {word} is: remove it or take another folder"):
        WRITERS[name](tmp_path / "run")
    assert [entry.name for entry in (tmp_path / "run").iterdir()] == [name]


@KINDS
@pytest.mark.parametrize("name", RULES)
def test_a_rule_is_not_saved_there(name, kind, word, tmp_path, precious):
    taken(tmp_path / "rule" / name, precious, kind)
    with pytest.raises(OSError, match=f"a file is to be written where {word} is"):
        CoordinatewiseLSTM(4, 1).save_pretrained(tmp_path / "rule")
    assert [entry.name for entry in (tmp_path / "rule").iterdir()] == [name]


NAMES = [
    "config.yaml", "environment.json", "metrics.jsonl", "model.safetensors", "figures/learning.png", ".lock",
    "checkpoints/00000002.pt", "checkpoints/00000002.sha256",
]  # fmt: skip


@KINDS
@pytest.mark.parametrize("name", NAMES)
def test_a_trainer_names_them_before_it_trains(name, kind, word, tmp_path, precious):
    taken(tmp_path / "run" / name, precious, kind)
    drawn = []
    trainer = make_trainer(tmp_path / "run")
    trainer.learner.on_iteration = lambda *call: drawn.append(call)
    with pytest.raises(OSError, match=word) as caught:
        trainer.fit()
    assert name.rpartition("/")[2] in str(caught.value)
    assert not drawn


@pytest.mark.parametrize("name", ["results.json", "figures/adaptation.png", "metrics.jsonl", "config.yaml"])
def test_a_command_names_them_before_it_trains(name, tmp_path, precious):
    taken(tmp_path / "run" / name, precious, "link")
    result = invoke(f"{SINUSOID} --iterations 2 --output {tmp_path}/run")
    assert result.exit_code == 1
    (line,) = result.stderr.splitlines()
    assert "where a symbolic link is: remove it or take another folder" in line
    assert name in line
    assert not (tmp_path / "run" / "checkpoints").exists()


@pytest.mark.parametrize("name", ["figures", "checkpoints"])
def test_a_file_where_a_folder_is_to_be_is_named(name, tmp_path):
    (tmp_path / name).write_text("")
    with pytest.raises(OSError, match=name):
        make_trainer(tmp_path).fit()


def test_temporary_files_of_guessed_names_are_not_written_through(tmp_path, precious):
    """Former names of temporary files are links to a valuable file."""
    folder = tmp_path / "run" / "checkpoints"
    folder.mkdir(parents=True)
    names = ["probe.tmp", "00000002.pt.tmp", "00000002.sha256.tmp", f"../.config.yaml.{os.getpid()}"]
    for name in names:
        (folder / name).symlink_to(precious)
    learner = Learner()
    config = TrainerConfig(iterations=2, num_tasks=2, eval_tasks=2, eval_every=2)
    optimizer = torch.optim.SGD(learner.parameters(), 0.1)
    Trainer(learner, Lines(), optimizer, config, folder=tmp_path / "run", progress=False).fit()
    assert {path.name for path in folder.iterdir()} == {"00000002.pt", "00000002.sha256"}


def test_a_folder_may_be_a_link(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "run").symlink_to(tmp_path / "disk")
    make_trainer(tmp_path / "run").fit()
    assert (tmp_path / "disk" / "checkpoints" / "00000006.pt").is_file()


def test_images_are_not_cached_through_a_link(tmp_path, precious):
    from PIL import Image

    root = tmp_path / "images"
    root.mkdir()
    Image.new("L", (2, 2), 7).save(root / "a.png")
    expected = load_images(root, [root / "a.png"], "x", "L", 2)
    (cache,) = (root / ".metakern-cache").glob("*.npy")
    cache.unlink()
    cache.symlink_to(precious)
    with pytest.warns(UserWarning, match="cannot be kept in .*where a symbolic link is"):
        images = load_images(root, [root / "a.png"], "x", "L", 2)
    assert torch.equal(images, expected)
    assert cache.is_symlink()


def test_a_new_file_is_new_and_has_the_modes_of_the_umask(tmp_path, precious):
    with pytest.raises(FileExistsError):
        open_new(precious)
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    with pytest.raises(FileExistsError):
        open_new(tmp_path / "dangling")
    old = os.umask(0o027)
    try:
        write_whole(tmp_path / "new", b"1")
    finally:
        os.umask(old)
    assert stat.S_IMODE((tmp_path / "new").stat().st_mode) == 0o640


def test_a_failing_writer_leaves_what_was_there(tmp_path):
    write_whole(tmp_path / "a", b"old")

    def fail(file):
        file.write(b"half")
        raise RuntimeError("no")

    with pytest.raises(RuntimeError, match="no"):
        write_whole(tmp_path / "a", fail)
    assert (tmp_path / "a").read_bytes() == b"old"
    assert len(list(tmp_path.iterdir())) == 1


def test_pipes_and_devices_are_no_files(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OSError, match="where no plain file is"):
        check_targets(tmp_path, ["pipe"])
