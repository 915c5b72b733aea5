"""The command `peft-cl`: train, tune, evaluate, predict, calibrate, look at an adapter, draw runs, or see the demo.

`python -m peft_cl.cli` is the same, so `accelerate launch -m peft_cl.cli train CONFIG.yaml` trains on several devices.
Only the module of the word that is given is imported: help and version need no torch.
"""

from __future__ import annotations

import argparse
import shlex
import sys
import traceback
import warnings
from collections.abc import Sequence
from importlib import import_module
from types import ModuleType

from .commands.output import complain, leave_pipe, plain_warnings, say
from .version import __version__


#: What there is to do; each is a module of `commands` with `add_arguments` and `run`.
WORDS = {
    "train": "learn a task sequence as a configuration file says",
    "tune": "search settings of a run on held-out training images",
    "evaluate": "measure a saved adapter on a data set",
    "predict": "say what a saved adapter takes images for",
    "calibrate": "fit the temperature of a saved adapter on held-out images",
    "push": "upload a saved adapter, with card, record and pictures",
    "card": "write the card of a run anew",
    "serve": "open a page on which a saved adapter answers and is taught classes",
    "export": "write a saved adapter with its backbone as an ONNX or torch.export file",
    "join": "make one adapter of several that were learnt apart, without training",
    "split": "take tasks out of a saved adapter into one of their own",
    "forget": "make an adapter that does not know some classes of a saved one",
    "info": "say what is in an adapter's folder",
    "compare": "run a suite of methods and seeds, and put the results into tables",
    "plot": "draw the pictures of a run, or of several side by side",
    "demo": "compare the methods on small images; needs no network",
}
#: Those that take a configuration, whose settings are options too, and what an interruption leaves of them.
CONFIGURED = {"train": "tasks", "tune": "trials"}

#: Those that know methods, heads and backbones by name, so that a user's own can be among them.
IMPORTING = (
    *("train", "compare", "tune", "evaluate", "predict", "calibrate", "export", "push", "serve", "join", "split"),
    *("forget", "info"),
)
IMPORTING_HELP = "run your own code first (a file or a module): the strategies, heads and families it registers"


def make_parser(word: str | None = None) -> argparse.ArgumentParser:
    """Make the parser of the command line; `train` and `tune` also take dotted names, which are read apart from it.

    Args:
        word: The one of `WORDS` whose options are wanted; the others are known by name. `None`: all by name.
    """
    parser = argparse.ArgumentParser(prog="peft-cl", description="Continual learning with prompts, as PEFT adapters.")
    parser.add_argument("--version", action="version", version=f"peft-cl {__version__}")
    words = parser.add_subparsers(dest="word", required=True, metavar=f"{{{','.join(WORDS)}}}")
    for name, text in WORDS.items():
        of_word = words.add_parser(name, help=text, description=f"{text.capitalize()}.", allow_abbrev=False)
        if name == word:
            module_of(name).add_arguments(of_word)
            if name in IMPORTING:  # taken out before the words are parsed
                of_word.add_argument("--import", metavar="FILE.py", action="append", help=IMPORTING_HELP)
    return parser


def module_of(word: str) -> ModuleType:
    return import_module(f"{__package__}.commands.{word}")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        argv: The words after `peft-cl`; `None`: those of the process.

    Returns:
        The exit status: 0, 2 for a fault in the command or its files (said in one line on the standard error), 130
        if interrupted, 141 if the reader of the output went away. argparse's own faults exit with 2 directly.
        Pictures, a card or an upload that failed are reported and leave it 0: the run is whole.

    Example:
        >>> main(["info", "out"])    # doctest: +SKIP
    """
    if argv is None:  # a process of our own
        sys.excepthook = lambda *fault: say("".join(traceback.format_exception(*fault)).rstrip(), sys.stderr)
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        try:
            return _run(words)
        except KeyboardInterrupt:  # while the program is loaded
            print("peft-cl: interrupted.", file=sys.stderr)
            return 130
        finally:
            sys.stdout and sys.stdout.flush()
    except BrokenPipeError:
        return leave_pipe()


def _run(words: list[str]) -> int:
    word = words[0] if words and words[0] in WORDS else None
    parser = make_parser(word)
    if word is None:
        parser.parse_args(words)  # help, version, or a fault: it ends the process
    from .commands.bars import no_bars_in_files
    from .commands.errors import CommandError
    from .commands.importing import import_given
    from .commands.options import split_overrides

    # PEFT asks each model for a property that transformers has renamed: nothing that a user could mend.
    warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing", category=FutureWarning)
    try:
        with plain_warnings():
            no_bars_in_files()
            words = import_given(words)
            module = module_of(word)
            if word not in CONFIGURED:
                return module.run(parser.parse_args(words)) or 0
            rest, overrides = split_overrides(words[1:], (*module.FLAGS, "--help"), module.OPTIONS)
            module.run(parser.parse_args([word, *rest]), overrides, command=shlex.join(["peft-cl", *words]))
        return 0
    except CommandError as error:
        from .commands.wording import for_the_command_line

        complain(for_the_command_line(str(error), word))
        return 2
    except KeyboardInterrupt:
        advice = (
            f" The {CONFIGURED[word]} finished are saved; --resume goes on with them." if word in CONFIGURED else ""
        )
        complain(f"interrupted.{advice}")
        return 130


if __name__ == "__main__":
    sys.exit(main())
