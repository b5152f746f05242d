"""Every setting has a flag, and every flag says what it does."""

import dataclasses
import re

import pytest

from thintune.cli.parser import bench_cost_parser, eval_parser, train_parser
from thintune.config import METHODS, PARTS, RunConfig


def settings():
    for field in dataclasses.fields(RunConfig):
        if field.name in PARTS:
            yield from (f"{field.name}.{inner.name}" for inner in dataclasses.fields(PARTS[field.name]))
        else:
            yield field.name


@pytest.mark.parametrize("parser", [train_parser, eval_parser, bench_cost_parser])
def test_every_flag_has_a_sentence_of_help(parser):
    silent = []
    for action in parser()._actions:
        text = str(action.help or "")
        is_group = re.fullmatch(r"Path to a configuration file\.", text) or action.dest in PARTS
        if not is_group and len(text.split()) < 3 and action.dest not in ("help",):
            silent.append(action.option_strings or action.dest)
    assert silent == []


def test_every_setting_is_a_flag_with_the_text_of_its_docstring(thintune):
    code, output, err = thintune("train", "--help")
    assert code == 0 and err == ""
    flags = train_parser().flags()
    assert [name for name in settings() if f"--{name}" not in flags] == []
    text = " ".join(output.split())
    for sentence in (
        "optimizer steps between two refreshes of the activation bases.",
        "Fit a new head on the converted model's features before training.",
        "Seed of weights, data order and dropout.",
        "CPU threads; default: all that torch finds.",
        "Share of the converted layers' weights to keep, in (0, 1]",
        "Continue the run in OUT bit for bit",
        "Replace an earlier run in OUT.",
    ):
        assert sentence in text, sentence
    for method in METHODS:
        assert re.search(rf"^  {method} +\w", output, re.MULTILINE), method


def test_the_first_page_names_the_commands_and_exit_codes(thintune):
    code, output, err = thintune("--help")
    assert code == 0 and err == "" and all(word in output for word in ("train", "eval", "bench", "--version", "130"))
    assert thintune("-h")[1] == output
    code, usage, _ = thintune()
    assert code == 2 and usage == output


def test_eval_help_names_its_flags(thintune):
    code, output, _ = thintune("eval", "--help")
    assert code == 0
    assert all(flag in output for flag in ("checkpoint", "--device", "--json", "--data.root", "--data.test_limit"))


def test_the_version_is_that_of_the_package(thintune):
    from importlib.metadata import version

    assert thintune("--version")[1].strip() == version("thintune")
