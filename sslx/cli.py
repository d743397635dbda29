"""The ``sslx`` command: its subcommands, and how errors are reported."""

import gc
import os
import sys
from collections.abc import Sequence
from contextlib import suppress
from importlib import import_module

from sslx import __version__
from sslx.console import streams
from sslx.console.words import one_line, shown
from sslx.errors import UserError
from sslx.machine import environment, interrupts, limits, proc

COMMANDS = {
    "pretrain": ("sslx.commands.pretrain:main", "pretrain an encoder: sslx pretrain simclr_digits"),
    "data": ("sslx.commands.data:main", "look at all images before a run: sslx data check or stats FOLDER"),
    "look": ("sslx.commands.look:main", "draw the views that a recipe would train on: sslx look RECIPE"),
    "resume": ("sslx.commands.resume:main", "continue a run: sslx resume runs/simclr_digits"),
    "probe": ("sslx.commands.probe:main", "evaluate a run's features, with labels and without"),
    "compare": ("sslx.commands.compare:main", "rank probed runs without labels: sslx compare RUN RUN"),
    "embed": ("sslx.commands.embed:main", "write the features of images to a file: sslx embed RUN -o FILE"),
    "neighbors": ("sslx.commands.neighbors:main", "find the images nearest to yours: sslx neighbors RUN IMAGE"),
    "seen": ("sslx.commands.seen:main", "show when and how an image took part in training"),
    "plot": ("sslx.commands.plot:main", "draw a run: loss, map of features, neighbors, views"),
    "report": ("sslx.commands.report:main", "write a page about runs: curves, scores, pictures, settings, cost"),
    "export": ("sslx.commands.export:main", "write a run's encoder so that another library loads it"),
    "weights": ("sslx.commands.weights:main", "show what a file of weights holds, and which encoder fits"),
    "verify": ("sslx.commands.verify:main", "check that W processes train like one: sslx verify simclr"),
    "bench": ("sslx.commands.bench:main", "find what limits a recipe on this machine, and what would help"),
    "sweep": ("sslx.commands.sweep:main", "train several runs, one after the other: sslx sweep FILE RECIPE"),
    "submit": ("sslx.commands.submit:main", "submit a run to a cluster: sslx submit --nodes 2 -- simclr_imagenet"),
    "methods": ("sslx.commands.lists:methods_main", "list the methods with their purpose, cost and paper"),
    "sources": ("sslx.commands.lists:sources_main", "list the sources of images with what they read and their options"),
    "recipes": ("sslx.commands.lists:recipes_main", "list the recipes with their data, hardware and score"),
    "jobs": ("sslx.commands.jobs:main", "show the state of every run in a folder"),
    "logs": ("sslx.commands.logs:main", "show the output of a run's job"),
    "cancel": ("sslx.commands.cancel:main", "save a checkpoint of a submitted run and end its job"),
    "doctor": ("sslx.commands.doctor:main", "show what this machine has and what it lacks"),
}
EXIT_CRASH = 70
_LIGHT_MODULES = tuple(f"sslx.commands.{name}" for name in ("jobs", "logs", "cancel", "submit"))  # compute nothing


def usage() -> str:
    """Return the text of ``sslx --help``."""
    lines = [
        f"sslx {__version__}: self-supervised pretraining of image encoders",
        "",
        "  sslx COMMAND [options]",
        "",
    ]
    lines += [f"  {name:10} {text}" for name, (_, text) in COMMANDS.items()]
    return "\n".join([*lines, "", "sslx COMMAND --help lists a command's options."])


def main(argv: Sequence[str] | None = None) -> int:
    """Run a subcommand and return its exit code (``sslx.errors`` lists them)."""
    streams.make_safe()
    try:
        code = _main(list(sys.argv[1:] if argv is None else argv))
        sys.stdout.flush()
        waiting = sys.modules.get("sslx.data.waiting")
        if waiting and waiting.is_stuck(2.0):  # Python would wait forever for the stuck thread
            sys.stderr.flush()
            os._exit(code)
        return code
    except BrokenPipeError:  # `sslx ... | head`: the reader has seen enough
        streams.drop_unread()
        return 141


def _main(argv: list[str]) -> int:
    if not argv or argv[0] in ("-h", "--help", "help"):
        sys.stdout.write(usage() + "\n")
        return 0
    if argv[0] in ("-V", "--version"):
        sys.stdout.write(f"sslx {__version__}\n")
        return 0
    if argv[0] not in COMMANDS:
        import difflib

        close = difflib.get_close_matches(argv[0][:100], COMMANDS, n=1, cutoff=0.65)
        hint = f"did you mean {close[0]}? " if close else ""
        return complain(f"sslx has no command '{shown(argv[0], 60)}': {hint}Use one of {', '.join(COMMANDS)}", 64)
    return run(COMMANDS[argv[0]][0], argv[1:])


def run(target: str, argv: Sequence[str]) -> int:
    """Call ``module:function``, and turn errors that a user can cause into one line and an exit code."""
    module, function = target.split(":")
    try:
        if module not in _LIGHT_MODULES:
            environment.check()
            limits.check_memory()
            interrupts.show_notice("starting ...")
        gc.disable()  # objects made by imports live as long as the process; collecting them costs 20 % of import time
        loaded = import_module(module)
        gc.freeze()
        gc.enable()
        interrupts.finish_imports()
        return getattr(loaded, function)(list(argv))
    except UserError as error:
        return complain(limits.explain(error) or str(error), error.exit_code, error.topic)
    except (ImportError, MemoryError, OSError, RuntimeError) as error:
        if isinstance(error, BrokenPipeError):
            raise
        device_errors = sys.modules.get("sslx.machine.device_errors")  # imported wherever a GPU is used
        if device_errors and (explanation := device_errors.explain(error)):
            return complain(*explanation)
        if message := limits.explain(error):
            return complain(message, limits.EXIT_CODE)
        raise
    except KeyboardInterrupt:
        return complain("interrupted", 130)
    except SystemExit as error:  # from tyro: 0 after --help, 2 after a wrong flag, which it has already explained
        if isinstance(error.__context__, BrokenPipeError):  # from rich
            return 141
        return 64 if error.code == 2 else int(error.code or 0)
    finally:
        gc.enable()
        if "triton" in sys.modules:  # triton reports uncollected objects as leaks; otherwise skipping them is faster
            gc.unfreeze()


def note(line: str) -> None:
    """Print a line that is neither an error nor the command's result."""
    sys.stderr.write(f"{one_line(line, 4_000)}\n")
    sys.stderr.flush()


def complain(message: str, code: int, topic: str = "") -> int:
    """Print an error once, although every rank of a job may report it, and return the exit code.

    topic: identifies the error where ranks word it differently; by default, the message does.
    """
    interrupts.clear_notice()
    message = one_line(message, 4_000)
    if _is_first_to_report(topic or message):
        sys.stderr.write(f"error: {message}\n")
        sys.stderr.flush()
    return code


def _is_first_to_report(message: str) -> bool:
    """Return whether this rank is the first of its siblings to report this, by creating a file that only one can make.

    A rank that meets its own file again belongs to another run of a parent that has started several.
    """
    rank = os.environ.get("RANK")
    if rank is None or not rank.isdecimal():
        return True
    import hashlib
    import tempfile

    _remove_files_of_the_past(tempfile.gettempdir())
    parent_start = proc.started(os.getppid()) or "0"
    ids = [
        os.environ.get(name, "") for name in ("MASTER_PORT", "TORCHELASTIC_RESTART_COUNT")
    ]  # which run of the parent
    digest = hashlib.blake2b("\n".join([message, *ids]).encode(errors="replace"), digest_size=8).hexdigest()
    path = os.path.join(tempfile.gettempdir(), f"sslx-said-{os.getppid()}-{parent_start}-{digest}")
    try:
        run = next(n for n in range(1_000) if _is_new(f"{path}-{n}-{rank}"))
        return _is_new(f"{path}-{run}")
    except (OSError, StopIteration):
        return True


def _remove_files_of_the_past(folder: str) -> None:
    """Remove the files of ranks whose parent has ended."""
    for name in os.listdir(folder):
        words = name.split("-")
        if name.startswith("sslx-said-") and len(words) > 3 and words[2].isdecimal():
            if (proc.started(int(words[2])) or "0") != words[3]:
                with suppress(OSError):
                    os.unlink(os.path.join(folder, name))


def _is_new(path: str) -> bool:
    """Create an empty file; return False if it already exists."""
    try:
        os.close(os.open(path, os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return False
    return True
