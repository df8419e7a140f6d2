"""Options without effect given another choice: errors on the command line, allowed in a configuration."""

import pytest
import yaml

from tests.cli.commands import SINUSOID, invoke, succeed

CLUSTERED = "--tasks regression-3 --iterations 2 --clusters 2 --cluster-begin 1"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--filters 32", "--filters has no meaning with --model mlp, whose size is --hidden"),
        ("--tasks digits --filters 0", "--filters has no meaning with --model mlp"),
        ("--tasks omniglot --model mlp --filters 3", "--filters has no meaning with --model mlp"),
        ("--tasks omniglot --hidden 9", "--hidden has no meaning with --model conv4, whose size is --filters"),
        ("--ways 3", "--ways has no meaning with --tasks sinusoid, which have no classes"),
        ("--tasks digits --data x", "--data has no meaning with --tasks digits: only omniglot and mini-imagenet come"),
        ("--cluster-warmup 3", "--cluster-warmup has no meaning without clusters: --clusters 4 makes four"),
        ("--cluster-warmup 0", "--cluster-warmup has no meaning without clusters"),
        ("--cluster-by modes --cluster-shared", "--cluster-by, --cluster-shared have no meaning without clusters"),
        ("--clusters 0 --cluster-batches one", "--cluster-batches has no meaning without clusters"),
        (
            "--clusters 2 --cluster-by embedding --cluster-begin 3",
            "--cluster-begin has no meaning with --cluster-by em",
        ),
        (
            "--clusters 2 --cluster-by modes --cluster-temperature 1 --cluster-eval-temperature 1",
            "--cluster-temperature, --cluster-eval-temperature have no meaning with --cluster-by modes, only by losses",
        ),
        (
            "--clusters 2 --cluster-by modes --cluster-method gmm",
            "--cluster-method has no meaning with --cluster-by mo",
        ),
        (
            "--clusters 2 --cluster-by embedding --cluster-shared",
            "--cluster-shared has no meaning with --cluster-batch",
        ),
        ("--rule-options hidden_size=4", "--rule-options has no meaning without --rule, whose options they are"),
        (
            "--rule meta-lstm --inner-lr 0.1",
            "--inner-lr has no meaning with --rule meta-lstm, which learns the size of its steps itself",
        ),
        ("--resume --overwrite", "--resume continues a run and --overwrite replaces it: give one of them"),
        ("--anil --parameters 0.*", "parameters must be left out where anil chooses them, got '0.*'"),
    ],
)
def test_both_options_are_named_and_nothing_is_written(options, message, tmp_path):
    result = invoke(f"train maml {options} --output {tmp_path}/run")
    assert result.exit_code == 1
    (line,) = result.stderr.splitlines()
    assert message in line
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "options",
    [
        "--cluster-method gmm --cluster-temperature 0.1 --cluster-eval-temperature 0.1 --cluster-warmup 1",
        "--cluster-by embedding --cluster-batches balanced --cluster-shared --cluster-method gmm",
        "--cluster-by modes --cluster-refresh 1 --clusters 3",
    ],
)
def test_what_has_a_meaning_is_taken(options, tmp_path):
    base = CLUSTERED.replace("--cluster-begin 1", "") if "--cluster-by" in options else CLUSTERED
    succeed(f"{SINUSOID} {base} {options} --output {tmp_path}/run --quiet")


def test_a_configuration_may_hold_what_its_choices_leave_without_meaning(tmp_path):
    succeed(f"{SINUSOID} {CLUSTERED} --cluster-warmup 1 --output {tmp_path}/run --quiet")
    config = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert (config["filters"], config["ways"], config["cluster_warmup"]) == (0, 5, 1)
    again = f"train maml --config {tmp_path}/run/config.yaml --quiet --output"
    succeed(f"{again} {tmp_path}/plain --clusters 0")
    assert yaml.safe_load((tmp_path / "plain" / "config.yaml").read_text())["clusters"] == "0"
    result = invoke(f"{again} {tmp_path}/wrong --clusters 0 --cluster-warmup 2")
    assert result.exit_code == 1
    assert "--cluster-warmup has no meaning without clusters" in result.stderr


def test_the_folder_of_images_is_for_runs_that_have_some(tmp_path):
    succeed(f"{SINUSOID} --iterations 2 --output {tmp_path}/run --quiet")
    result = invoke(f"eval maml {tmp_path}/run --data {tmp_path}")
    assert result.exit_code == 1
    assert f"--data has no meaning for {tmp_path}/run, a run on --tasks sinusoid" in result.stderr
