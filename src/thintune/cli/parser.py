"""Flags, YAML files and help, all from the configuration dataclasses."""

from __future__ import annotations

import re
import sys
from argparse import RawDescriptionHelpFormatter
from typing import Any, NoReturn

from jsonargparse import ArgumentParser, DefaultHelpFormatter, set_parsing_settings

from thintune.config import RunConfig
from thintune.errors import nearest

TRAIN_HELP = """Fine-tune a model and write OUT/record.json, a checkpoint and a resumable state.

methods:
  thin     low-rank weights fitted to the data, gradients in a subspace of each layer's input
  wasi     low-rank weights by SVD, inputs kept as Tucker forms (arXiv 2510.09160)
  wsi      low-rank weights by SVD, inputs kept whole
  asi      dense weights, inputs kept as Tucker forms (arXiv 2505.05086)
  amc      dense weights, inputs kept as their exact HOSVD of every step (arXiv 2411.06346)
  lora     adapters on every linear layer (peft)
  lora_fa  the same with the first half of each adapter frozen (arXiv 2308.03303)
  svd_lora frozen low-rank weights by SVD in the norm of their inputs, adapters beside them (arXiv 2403.07378)
  galore   every weight, the optimizer in a subspace of each gradient (arXiv 2403.03507; pytorch-optimizer)
  head     the classifier head alone
  dense    every weight"""

BENCH_COST_HELP = """Measure what training really takes: a row a way to take the same step, each in a fresh process.

The rows: dense, LoRA and GaLore in plain PyTorch with micro-batches, checkpointing and the optimizer in the backward
pass; asi, wsi, wasi and thin. OUT/table.md and OUT/table.json hold medians and spread, OUT/cells one JSON a process; a
process that has ended is not run again. docs/bench_cost.md says what is measured and how."""

BENCH_FRONTIER_HELP = """Accuracy against memory and time: every method at its best learning rate, over several seeds.

Each row first tries its learning rates with seed 0 and keeps the one of the highest validation accuracy; a sweep whose
best rate is its lowest or highest goes on. Then all seeds run at that rate, and each of them reads the official test
split once. Every run is a fresh process; OUT/cells holds one JSON for each, and a run that has ended is not repeated.
OUT/report.html, frontier.json and frontier.csv show what came of it; docs/bench_frontier.md says what is measured."""

EVAL_HELP = "Measure a checkpoint on the test split of the data it was trained on."


set_parsing_settings(docstring_parse_attribute_docstrings=True)


class _Formatter(RawDescriptionHelpFormatter, DefaultHelpFormatter):
    """Keeps the lines of the description; everything else as jsonargparse prints it."""


class Parser(ArgumentParser):
    """Reports every mistake in one line, with the nearest known flag, and exits with 2."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Prints the mistake and leaves."""
        text = explain(" ".join(message.split()), self.flags())
        print(f"thintune: error: {text}", file=sys.stderr)
        raise SystemExit(2)

    def parse_args(self, *args: Any, **kwargs: Any) -> Any:
        """Parses; a file that is no text is a mistake like any other."""
        try:
            return super().parse_args(*args, **kwargs)
        except UnicodeDecodeError as error:
            self.error(f"--config: expected a YAML file, got one that is no text: {error}.")

    def flags(self) -> list[str]:
        """Every long flag of this command."""
        return [s for action in self._actions for s in action.option_strings if s.startswith("--")]


def explain(text: str, flags: list[str]) -> str:
    """Puts the parser's message in terms of what the user wrote, with the nearest known flag or value."""
    if found := re.search(r"unrecognized arguments: (.*)", text, re.IGNORECASE):
        word = found.group(1).split()[0].split("=")[0]
        return f"{word}: unknown flag.{nearest(word, flags)}"
    if found := re.search(
        r"key ['\"]([\w.]+)['\"] is not expected|no action for key ['\"]([\w.]+)['\"]", text, re.IGNORECASE
    ):
        word = found.group(1) or found.group(2)
        return f"{word}: unknown configuration key.{nearest(word, [flag.lstrip('-') for flag in flags])}"
    if found := re.search(r'key "([\w.]+)": Expected a (.*?)\. Got value: (.*)', text):
        name, expected, value = found.groups()
        known = re.findall(r"'([^']+)'", expected) if "Literal" in expected else []
        expected = "a list, as [blocks, head]" if "tuple" in expected else expected
        wanted = f"one of {', '.join(known)}" if known else re.sub(r"<class '(\w+)'>", r"\1", expected)
        return f"--{name}: expected {wanted}, got {value!r}.{nearest(value, known)}"
    if found := re.search(r"Option '([\w.]+)' is not accepted", text):
        word = found.group(1)
        return f"{word}: unknown configuration key.{nearest(word, [flag.lstrip('-') for flag in flags])}"
    if found := re.search(r"Group '([\w.]+)' does not accept option '(\w+)'", text):
        word = ".".join(found.groups())
        return f"{word}: unknown configuration key.{nearest(word, [flag.lstrip('-') for flag in flags])}"
    if found := re.search(r"the following arguments are required: (.*)", text):
        names = [f"--{name}" if f"--{name}" in flags else name for name in found.group(1).split(", ")]
        return f"missing: {', '.join(names)}."
    return text


def train_parser() -> Parser:
    """Parser of `thintune train`."""
    parser = Parser(prog="thintune train", description=TRAIN_HELP, formatter_class=_Formatter, allow_abbrev=False)
    parser.add_argument("--config", action="config", help="YAML file with any of the settings below; flags win.")
    parser.add_argument("--out", required=True, type=str, help="Folder of the run, made if need be.")
    parser.add_argument("--resume", action="store_true", help="Continue the run in OUT bit for bit, with its settings.")
    parser.add_argument("--overwrite", action="store_true", help="Replace an earlier run in OUT.")
    parser.add_class_arguments(RunConfig, None, fail_untyped=True)
    return parser


def bench_cost_parser() -> Parser:
    """Parser of `thintune bench cost`."""
    from thintune.bench.cost.settings import CostSettings

    parser = Parser(
        prog="thintune bench cost", description=BENCH_COST_HELP, formatter_class=_Formatter, allow_abbrev=False
    )
    parser.add_argument("--config", action="config", help="YAML file with any of the settings below; flags win.")
    parser.add_argument("--out", type=str, default=None, help="Folder of the bench, made if need be.")
    parser.add_argument("--list", action="store_true", help="Print the selected rows and do nothing else.")
    parser.add_class_arguments(CostSettings, None, fail_untyped=True)
    return parser


def bench_frontier_parser() -> Parser:
    """Parser of `thintune bench frontier`."""
    from thintune.bench.frontier.settings import FrontierSettings

    parser = Parser(
        prog="thintune bench frontier", description=BENCH_FRONTIER_HELP, formatter_class=_Formatter, allow_abbrev=False
    )
    parser.add_argument("--config", action="config", help="YAML file with any of the settings below; flags win.")
    parser.add_argument("--out", type=str, default=None, help="Folder of the bench, made if need be.")
    parser.add_argument("--list", action="store_true", help="Print the selected rows and do nothing else.")
    parser.add_class_arguments(FrontierSettings, None, fail_untyped=True)
    return parser


def eval_parser() -> Parser:
    """Parser of `thintune eval`."""
    parser = Parser(prog="thintune eval", description=EVAL_HELP, allow_abbrev=False)
    parser.add_argument("checkpoint", type=str, help="Checkpoint folder: OUT/checkpoint of a run, or OUT itself.")
    parser.add_argument("--device", type=str, default="cpu", help="cpu or cuda.")
    parser.add_argument("--threads", type=int, default=None, help="Threads of torch; by default what torch chooses.")
    parser.add_argument("--json", action="store_true", help="Print one line of JSON instead of text.")
    parser.add_argument("--data.root", type=str, default=None, help="The data's folder, where it has moved.")
    parser.add_argument("--data.test_limit", type=int, default=None, help="Use this many test images.")
    return parser
