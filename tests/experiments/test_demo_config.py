"""The command line of the demo."""

import dataclasses
import json
from pathlib import Path

import pytest

from experiments.demo.config import Config, parse


def test_defaults_are_those_of_config():
    assert parse([]) == Config()


def test_every_field_is_an_option():
    values = {"out": "elsewhere", "test_fraction": "0.25", "averaging_constant": "0.5"}
    words = []
    for field in dataclasses.fields(Config):
        words += ["--" + field.name.replace("_", "-"), values.get(field.name, "7")]
    config = parse(words)
    assert config.out == Path("elsewhere")
    assert (config.test_fraction, config.averaging_constant) == (0.25, 0.5)
    rest = [getattr(config, field.name) for field in dataclasses.fields(Config) if field.name not in values]
    assert rest == [7] * len(rest)


@pytest.mark.parametrize(
    "words",
    [
        ["--epochs", "3"],
        ["--qat-epoch", "3"],  # an abbreviation: it would mean something else once an option is added
        ["--seeds", "three"],
        ["--seeds", "0"],
        ["--test-fraction", "1"],
        ["--averaging-constant", "0"],
        ["--float-learning-rate", "nan"],
        ["stray"],
    ],
)
def test_what_it_does_not_know_it_refuses(words, capsys):
    with pytest.raises(SystemExit) as refusal:
        parse(words)
    assert refusal.value.code == 2
    assert "error" in capsys.readouterr().err


def test_smoke_keeps_the_other_options():
    config = parse(["--smoke", "--batch-size", "32"])
    assert (config.batch_size, config.seeds) == (32, 1)
    assert config.float_epochs < Config().float_epochs


def test_json_holds_what_decides_the_numbers():
    fields = json.loads(json.dumps(Config().as_json()))
    assert "out" not in fields
    assert fields["seeds"] == 3
