"""Entry point of the command line."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence

from thintune.errors import ThintuneError, nearest

USAGE = """usage: thintune COMMAND [flags]

Fine-tune transformers where memory is scarce.

commands:
  train   fine-tune a model: dense, or thin in one of several ways, or with LoRA
  convert turn dense weights into a thin checkpoint
  eval    measure a checkpoint on its test split
  bench   measure what training takes and gives: `thintune bench cost`, `thintune bench frontier`

`thintune COMMAND --help` lists the flags of a command; `thintune --version` prints the version.
Exit codes: 0 done, 2 bad input or a failed run (one line says why), 130 interrupted (the state is saved)."""


_OUT_OF_MEMORY = "out of memory; lower train.micro_batch or thin.kept."


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command.

    Args:
        arguments: the words after `thintune`; those of the process by default.

    Returns:
        0 done, 2 bad input or a failed run, 130 interrupted.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    if not words or words[0] in ("-h", "--help"):
        print(USAGE)
        return 0 if words else 2
    if words[0] == "--version":
        import thintune

        print(thintune.__version__)
        return 0
    commands = _commands()
    if words[0] not in commands:
        known = ", ".join(commands)
        return _fail(f"{words[0]}: unknown command, expected one of {known}.{nearest(words[0], commands)}")
    try:
        return commands[words[0]](words[1:])
    except ThintuneError as error:
        return _fail(str(error))
    except KeyboardInterrupt:
        print("thintune: interrupted", file=sys.stderr)
        return 130
    except SystemExit as leave:
        return leave.code if isinstance(leave.code, int) else 2
    except MemoryError:
        return _fail(_OUT_OF_MEMORY)
    except RuntimeError as error:  # what torch raises, on a CPU and on a GPU
        if not any(words in str(error) for words in ("can't allocate memory", "out of memory")):
            raise
        return _fail(_OUT_OF_MEMORY)


def _fail(message: str) -> int:
    print(f"thintune: error: {' '.join(message.split())}", file=sys.stderr)
    return 2


def _commands() -> dict[str, Callable[[Sequence[str]], int]]:
    def train(words: Sequence[str]) -> int:
        from thintune.cli.train import run

        return run(words)

    def evaluate(words: Sequence[str]) -> int:
        from thintune.cli.evaluate import run

        return run(words)

    def convert(words: Sequence[str]) -> int:
        from thintune.cli.convert import run

        return run(words)

    def bench(words: Sequence[str]) -> int:
        from thintune.cli.bench import run

        return run(words)

    return {"train": train, "convert": convert, "eval": evaluate, "bench": bench}
