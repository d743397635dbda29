"""The ``sslx`` command: one list of subcommands, and what an error looks like."""

import gc
import os
import sys
from collections.abc import Sequence
from importlib import import_module

from sslx import __version__
from sslx.console import streams
from sslx.console.words import one_line, shown
from sslx.errors import UserError
from sslx.machine import environment, interrupts, limits, proc

COMMANDS = {
    "pretrain": ("sslx.commands.pretrain:main", "pretrain an encoder: sslx pretrain simclr_digits"),
    "resume": ("sslx.commands.resume:main", "go on with a run: sslx resume runs/simclr_digits"),
    "probe": ("sslx.commands.probe:main", "what a run's features are worth, with labels and without"),
    "plot": ("sslx.commands.plot:main", "pictures of a run: loss, map of features, neighbors, views"),
    "verify": ("sslx.commands.verify:main", "whether W processes train as one does: sslx verify simclr"),
    "bench": ("sslx.commands.bench:main", "what limits a recipe on this machine, and what would help"),
    "sweep": ("sslx.commands.sweep:main", "several runs, one after the other: sslx sweep FILE RECIPE"),
    "submit": ("sslx.commands.submit:main", "a run as a cluster's job: sslx submit --nodes 2 -- simclr_imagenet"),
    "methods": ("sslx.commands.lists:methods_main", "the methods: what each is, its paper, its cost"),
    "sources": ("sslx.commands.lists:sources_main", "the sources of images: what each reads, its options"),
    "recipes": ("sslx.commands.lists:recipes_main", "the recipes: method, data, hardware, score"),
    "jobs": ("sslx.commands.jobs:main", "status of every run in a folder"),
    "logs": ("sslx.commands.logs:main", "what the job of a run has printed"),
    "cancel": ("sslx.commands.cancel:main", "save a checkpoint of a submitted run and end its job"),
    "doctor": ("sslx.commands.doctor:main", "what this machine has, and what is missing"),
}
EXIT_CRASH = 70
_COMPUTE_NOTHING = tuple(f"sslx.commands.{name}" for name in ("jobs", "logs", "cancel", "submit"))


def usage() -> str:
    lines = [
        f"sslx {__version__}: self-supervised pretraining of image encoders",
        "",
        "  sslx COMMAND [options]",
        "",
    ]
    lines += [f"  {name:10} {text}" for name, (_, text) in COMMANDS.items()]
    return "\n".join([*lines, "", "sslx COMMAND --help lists a command's options."])


def main(argv: Sequence[str] | None = None) -> int:
    """Run a subcommand; returns the exit code (sslx.errors lists them)."""
    streams.make_safe()
    try:
        code = _main(list(sys.argv[1:] if argv is None else argv))
        sys.stdout.flush()
        patience = sys.modules.get("sslx.data.patience")
        if patience and patience.is_stuck(2.0):  # Python would wait for the thread for ever
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
        return complain(f"sslx has no command '{shown(argv[0], 60)}': {hint}it has {', '.join(COMMANDS)}", 64)
    return run(COMMANDS[argv[0]][0], argv[1:])


def run(target: str, argv: Sequence[str]) -> int:
    """Call ``module:function`` and turn what a user can cause into one line and an exit code."""
    module, function = target.split(":")
    try:
        if module not in _COMPUTE_NOTHING:
            environment.check()
            limits.check_memory()
            interrupts.notice("starting ...")
        gc.disable()  # what an import makes stays: to look for garbage in it takes a fifth of the import's time
        loaded = import_module(module)
        gc.freeze()
        gc.enable()
        interrupts.has_imported()
        return getattr(loaded, function)(list(argv))
    except UserError as error:
        return complain(limits.explain(error) or str(error), error.exit_code, error.topic)
    except (ImportError, MemoryError, OSError, RuntimeError) as error:
        if isinstance(error, BrokenPipeError):
            raise
        device_errors = sys.modules.get("sslx.machine.device_errors")  # there wherever torch and images are
        if device_errors and (told := device_errors.explain(error)):
            return complain(*told)
        if words := limits.explain(error):
            return complain(words, limits.EXIT_CODE)
        raise
    except KeyboardInterrupt:
        return complain("interrupted", 130)
    except SystemExit as error:  # tyro: 0 after --help, 2 after a wrong flag, which it has explained
        if isinstance(error.__context__, BrokenPipeError):  # rich
            return 141
        return 64 if error.code == 2 else int(error.code or 0)
    finally:
        gc.enable()
        if "triton" in sys.modules:  # it reports what the exit leaves as leaked; for the rest, not to look is faster
            gc.unfreeze()


def note(line: str) -> None:
    """Print a line that is neither an error nor the command's result."""
    sys.stderr.write(f"{one_line(line, 4_000)}\n")
    sys.stderr.flush()


def complain(message: str, code: int, topic: str = "") -> int:
    """Print the error once, although every rank of a job may have met it; returns the code.

    topic: what makes it the same error where ranks word it differently; "": its words.
    """
    interrupts.clear()
    message = one_line(message, 4_000)
    if _first_to_say(topic or message):
        sys.stderr.write(f"error: {message}\n")
        sys.stderr.flush()
    return code


def _first_to_say(message: str) -> bool:
    """Whether no sibling (a rank started by the same parent) has said this: a file that only one can create.

    One that meets it again is another run's rank, of a parent that has started several.
    """
    rank = os.environ.get("RANK")
    if rank is None or not rank.isdecimal():
        return True
    import hashlib
    import tempfile

    started = proc.started(os.getppid()) or "0"
    start = [os.environ.get(name, "") for name in ("MASTER_PORT", "TORCHELASTIC_RESTART_COUNT")]  # of the same parent
    digest = hashlib.blake2b("\n".join([message, *start]).encode(errors="replace"), digest_size=8).hexdigest()
    path = os.path.join(tempfile.gettempdir(), f"sslx-said-{os.getppid()}-{started}-{digest}")
    try:
        run = next(n for n in range(1_000) if _is_new(f"{path}-{n}-{rank}"))
        return _is_new(f"{path}-{run}")
    except (OSError, StopIteration):
        return True


def _is_new(path: str) -> bool:
    """Whether this call made the file."""
    try:
        os.close(os.open(path, os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return False
    return True
