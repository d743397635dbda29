"""The house rules that the syntax tree shows: the import arrow, the only importers, sizes, names, ignores."""

import ast
import itertools
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[1]
CODE = sorted(p for top in ("sslx", "kernels", "launch", "benchmarks", "slurm") for p in (ROOT / top).rglob("*.py"))
OLD_PLACES = [ROOT / "sslx" / "requeue.py", ROOT / "sslx" / "train" / "job.py"]
"""What jobs that were queued by sslx 0.1 name; each hands on to its new place."""
SSLX = [path for path in CODE if path.is_relative_to(ROOT / "sslx") and path not in OLD_PLACES]
FILES = CODE + sorted((ROOT / "tests").rglob("*.py"))

LEAVES = ("errors", "by_name", "console", "rng", "distributed", "parallel", "lazy", "machine")
"""Anyone may import these; they import no other part."""

ARROW = (
    ("runs",),
    ("data",),
    ("encoders", "losses", "optim"),
    ("methods",),
    ("probe.config", "monitor.config"),
    ("config",),
    ("trained",),
    ("probe",),
    ("plot", "monitor", "export"),
    ("report", "embed", "check"),
    ("cli",),  # names its commands by strings, so that `sslx --help` imports nothing
    ("train",),
    ("cluster", "bench"),
    ("commands",),
    ("__main__",),
)
"""The parts of sslx, each of which imports leaves and earlier ones only; those of one row not one another."""

ONLY_IMPORTERS = {
    "torch.distributed": ("sslx/distributed.py", "benchmarks/fake_step.py"),
    "nvidia.dali": ("sslx/data/backends/dali.py",),
    "wandb": ("sslx/runs/trackers.py",),
    "torch.utils.tensorboard": ("sslx/runs/trackers.py",),
    "tyro": ("sslx/config/parser.py",),
    "submitit": ("sslx/cluster/submit.py",),
    "sslx_kernels": ("sslx/losses/",),
    "torch.optim.lr_scheduler": (),
    "random": (),
    "numpy.random": (),
}

MAX_IGNORES = 14
"""Of pyright, all in wrappers of untyped libraries.  Lower it when one goes; do not raise it."""


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(), str(path))


def imported(tree: ast.AST) -> Iterator[str]:
    """Every dotted name that is imported, at any depth, and every ``torch.distributed`` reached by attribute."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: relative import"
            assert node.module
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            if node.value.id in ("torch", "np", "nvidia"):
                yield f"{node.value.id.replace('np', 'numpy')}.{node.attr}"


def part_of(module: str) -> str:
    """The part of sslx that a dotted name below it belongs to: the longest name of LEAVES and ARROW that fits."""
    names = module.split(".")
    known = {*LEAVES}.union(*ARROW)
    fitting = [part for n in range(len(names), 0, -1) if (part := ".".join(names[:n])) in known]
    return fitting[0] if fitting else names[0]


def parts(path: Path) -> set[str]:
    """The parts of sslx that a file imports."""
    inside = {name.removeprefix("sslx.") for name in imported(tree_of(path)) if name.startswith("sslx.")}
    return {part_of(name) for name in inside} - {"__version__"}


def own_part(path: Path) -> str:
    return part_of(".".join(path.relative_to(ROOT / "sslx").with_suffix("").parts))


def test_the_arrow_knows_every_part():
    known = {*LEAVES, "__init__"}.union(*ARROW)
    assert {own_part(path) for path in SSLX} <= known, "say in ARROW where the new part stands"
    assert len(SSLX) > 30


def may_import(path: Path) -> set[str]:
    """The parts of sslx that a file may import, by the arrow."""
    part = own_part(path)
    if part in LEAVES or part == "__init__":
        itself = set[str]() if path.parent == ROOT / "sslx" else {part}
        allowed = set(LEAVES) - {part} | itself if part != "errors" else set[str]()
    else:
        row = next(i for i, row in enumerate(ARROW) if part in row)
        allowed = {*LEAVES, part}.union(*ARROW[:row])
        allowed |= {part for part in (part.split(".")[0],) if path.name == "config.py"}  # of which only __init__ runs
    if part == "__init__":
        allowed |= {"trained", "train"}  # whose names it gives when they are first used
    return allowed


def test_imports_point_backwards_along_the_arrow():
    against = {name_of(path): parts(path) - may_import(path) for path in SSLX}
    assert {name: parts for name, parts in against.items() if parts} == {}


def test_each_foreign_library_has_one_importer():
    for file in CODE:
        for name, (library, importers) in itertools.product(imported(tree_of(file)), ONLY_IMPORTERS.items()):
            if name == library or name.startswith(library + "."):
                outside = not file.is_relative_to(ROOT / "sslx") and library != "torch.distributed"
                assert outside or name_of(file).startswith(importers or ("-",)), f"{name_of(file)} imports {name}"


def test_kernels_stand_alone():
    kernels = [path for path in CODE if path.is_relative_to(ROOT / "kernels")]
    assert kernels
    for path in kernels:
        tops = {name.partition(".")[0] for name in imported(tree_of(path))}
        foreign = tops - sys.stdlib_module_names - {"torch", "triton", "sslx_kernels", "__future__"}
        assert not foreign, f"{name_of(path)} imports {foreign}"
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_a_file_says_first_what_it_is():
    for path in FILES:
        first, said = tree_of(path).body[0], ast.get_docstring(tree_of(path), clean=False)
        assert first.lineno == 1, name_of(path)
        assert said, name_of(path)
        assert said[0].strip(), name_of(path)


def test_files_and_functions_are_short():
    long = {name_of(path): lines for path in CODE if (lines := path.read_text().count("\n")) >= 400}
    long |= {
        f"{name_of(path)}: {node.name}": lines
        for path in CODE
        for node in ast.walk(tree_of(path))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and (lines := (node.end_lineno or 0) - node.lineno + 1) > 60
    }
    assert long == {}


def test_names_say_what_is_inside():
    for path in [*FILES, *(ROOT / "launch").iterdir(), *(ROOT / "slurm").iterdir()]:
        words = set(re.split(r"[/._]", name_of(path).lower()))
        assert not words & {"utils", "util", "misc", "helpers", "helper", "common", "legacy"}, path


def test_no_script_is_named_like_a_standard_module():
    """A script's folder comes first in sys.path: a launch/profile.py would be everyone's ``profile``."""
    for top in ("launch", "benchmarks", "slurm"):
        assert not (ROOT / top / "__init__.py").exists()
        names = {path.stem for path in (ROOT / top).glob("*.py")}
        assert not names & (sys.stdlib_module_names | {"torch", "timm", "numpy", "sslx", "submitit", "wandb"})


def test_what_the_checkers_are_told_to_ignore_is_named_and_rare():
    lines = [(name_of(path), line) for path in CODE for line in path.read_text().splitlines()]
    ignores = [(name, line) for name, line in lines if re.search(r"(pyright|type): ?ignore", line)]
    for name, line in ignores:
        assert re.search(r"# pyright: ignore\[report\w+(, report\w+)*\]", line), f"{name}: {line}"
    for name, line in lines:
        if "noqa" in line:
            assert re.search(r"# noqa: [A-Z]+\d+", line), f"{name}: {line}"
    assert len(ignores) <= MAX_IGNORES


def test_importing_sslx_imports_nothing_heavy():
    code = "import sys; before = set(sys.modules); import sslx; print(*sorted(set(sys.modules) - before))"
    new = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert [name for name in new if name.split(".")[0] not in sys.stdlib_module_names] == ["sslx", "sslx.lazy"]
