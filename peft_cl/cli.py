"""The command `peft-cl`: train, evaluate, look at an adapter, draw runs, or see the demonstration.

`python -m peft_cl.cli` is the same, so `accelerate launch -m peft_cl.cli train CONFIG.yaml` trains on several devices.
"""

from __future__ import annotations

import argparse
import shlex
import sys
import warnings
from collections.abc import Sequence

from .commands import demo, evaluate, info, plot, train
from .commands.errors import CommandError
from .commands.options import split_overrides
from .version import __version__


def make_parser() -> argparse.ArgumentParser:
    """Make the parser of the command line; `train` also takes dotted names, which are read apart from it."""
    parser = argparse.ArgumentParser(prog="peft-cl", description="Continual learning with prompts, as PEFT adapters.")
    parser.add_argument("--version", action="version", version=f"peft-cl {__version__}")
    words = parser.add_subparsers(dest="word", required=True, metavar="{train,evaluate,info,plot,demo}")
    for module, name, text in (
        (train, "train", "learn a task sequence as a configuration file says"),
        (evaluate, "evaluate", "measure a saved adapter on a data set"),
        (info, "info", "say what is in an adapter's folder"),
        (plot, "plot", "draw the pictures of a run, or of several side by side"),
        (demo, "demo", "compare the methods on small images; needs no network"),
    ):
        module.add_arguments(
            words.add_parser(name, help=text, description=text.capitalize() + ".", allow_abbrev=False)
        )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        argv: The words after `peft-cl`; `None`: those of the process.

    Returns:
        The exit status: 0, 2 for a fault in the command or its files (said in one line on the standard error), 130
        if interrupted. argparse's own faults exit with 2 directly.

    Example:
        >>> main(["info", "out"])    # doctest: +SKIP
    """
    # PEFT asks each model for a property that transformers has renamed: nothing that a user could mend.
    warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing", category=FutureWarning)
    words = list(sys.argv[1:] if argv is None else argv)
    parser = make_parser()
    try:
        if words[:1] != ["train"]:
            arguments = parser.parse_args(words)
            {"evaluate": evaluate, "info": info, "plot": plot, "demo": demo}[arguments.word].run(arguments)
            return 0
        rest, overrides = split_overrides(words[1:], flags=("--overwrite", "--resume", "--help"))
        train.run(parser.parse_args(["train", *rest]), overrides, command=shlex.join(["peft-cl", *words]))
        return 0
    except CommandError as error:
        print(f"peft-cl: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        advice = " The tasks finished are saved; --resume goes on with them." if words[:1] == ["train"] else ""
        print(f"peft-cl: interrupted.{advice}", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
