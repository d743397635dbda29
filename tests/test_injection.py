"""Nothing that a shared recipe, profile or sweep says is run: batch scripts of hostile values, run by a real bash."""

import dataclasses
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from kit.processes import TINY, Record
from sslx import cli, config
from sslx.cluster import submit
from sslx.cluster.allocation import Config
from sslx.errors import ConfigError

ROOT = Path(__file__).parents[1]
HOSTILE = [
    "$(touch RAN)", "`touch RAN`", "a;touch RAN", "a\ntouch RAN\nb", "a\rtouch RAN", "a&touch RAN&", "a|touch RAN",
    "a\\", "a b", "größe", "a-b_c.d", "a=b", "a+b,c",
    "a'b", 'a"b', "a'; touch RAN; '", 'a"; touch RAN; "', "$(touch${IFS}RAN)", "${HOME}", "*", "~", "a#b", "#a",
    "a\x00b", "a\x1b[31mb", "-a", "--wrap=touch RAN", "a\\\ntouch RAN", "!!", "<(touch RAN)", "a>RAN",
    "\u2028touch RAN", "a/../RAN", "%j", "{a,b}", "a\ttouch RAN", " \n#SBATCH --wrap=touch", "\udcff", "a" * 300,
]  # fmt: skip
ORDINARY = ["a b", "größe", "a-b_c.d", "a=b", "a+b,c"]
"""Values that must work everywhere."""


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with stubs of Slurm's commands in PATH; srun writes its arguments and the interface down."""
    stubs = tmp_path / "bin"
    stubs.mkdir()
    said = 'printf \'%s\\0\' "$@" "NCCL=${NCCL_SOCKET_IFNAME:-}" > srun.said'
    scripts = {"srun": said, "squeue": "", "scontrol": "", "scancel": "", "sbatch": SBATCH}
    for name, script in scripts.items():
        (stubs / name).write_text(f"#!/bin/bash\n{script}\n")
        (stubs / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{stubs}:{os.environ['PATH']}")
    monkeypatch.setattr(sys, "executable", "/bin/true")  # what asks for a requeue at the script's end
    return tmp_path


SBATCH = 'cp "${@: -1}" "$SBATCH_TO"; echo "Submitted batch job 7"'


def script_of(folder: Path, wanted: Config, name: str = "r", runs: str = "runs") -> str:
    """The batch script, made as ``sslx submit`` makes it; ConfigError where the values are refused."""
    run = config.PretrainConfig(name=name, runs=folder / runs)
    submit.check(wanted, [run], {})
    script = submit.batch_script(submit.build_executor(wanted, run.runs / run.name, [run]), 1)
    submit.check_script(script, wanted)
    return script


def options_of(script: str) -> dict[str, str]:
    """What sbatch reads: its lines up to the first command, with the quotes taken off as it does."""
    words = [shlex.split(line.removeprefix("#SBATCH ")) for line in script.splitlines() if line.startswith("#SBATCH ")]
    assert all(len(line) == 1 for line in words), words
    pairs = [line[0].removeprefix("--").partition("=") for line in words]
    return {name: value for name, _, value in pairs}


def bash(folder: Path, *argv: str, **environ: str) -> subprocess.CompletedProcess[str]:
    environ = os.environ | environ
    return subprocess.run(
        ["bash", *argv], cwd=folder, env=environ, capture_output=True, text=True, check=False, timeout=60
    )


def run_by_bash(folder: Path, script: str) -> list[str]:
    """Run it; the arguments that srun got."""
    for left in ("srun.said", "RAN"):
        (folder / left).unlink(missing_ok=True)
    (folder / "script").write_text(script)
    done = bash(folder, "script")
    assert (done.returncode, done.stderr) == (0, "")
    assert not (folder / "RAN").exists(), script
    return (folder / "srun.said").read_text().split("\0")


TEXT_FIELDS = ["partition", "account", "qos", "constraint", "reservation"]
FIELDS = [*TEXT_FIELDS, "container", "mounts", "interface", "python", "sbatch", "sbatch value", "time", "name", "runs"]


def tried(place: Path, field: str, value: str) -> str | ConfigError:
    """The batch script with this value in this field, or why it is refused."""
    given: dict[str, Any] = {} if field in ("name", "runs") else {field: value}
    if field.startswith("sbatch"):
        given = {"sbatch": (f"comment={value}" if "value" in field else value,)}
    try:
        return script_of(place, Config(**given), **({} if given else {field: value}))
    except ConfigError as error:
        return error


def arrived(place: Path, field: str, value: str, options: dict[str, str], said: list[str]) -> bool:
    """Whether Slurm or the job gets the value as it is: from sbatch's options, or from what srun's stub said."""
    if field in TEXT_FIELDS:
        return options[field] == value
    if field == "sbatch value":
        return options["comment"] == value
    if field == "sbatch":
        return value.partition("=")[2] == options[Config.sbatch_name(value)]
    if field in ("container", "mounts"):
        return f"--container-{field.replace('container', 'image')}={value}" in said
    if field == "interface":
        return f"NCCL={value}" in said
    if field == "python":
        words = shlex.split(value)
        return said[said.index("-u") - len(words) : said.index("-u")][1:] == words[1:]
    folder = place / "runs" / value if field == "name" else place / value / "r"
    return options["output"] == f"{folder}/job/%j.log" and options["job-name"] == (value if field == "name" else "r")


@pytest.mark.parametrize("field", FIELDS)
def test_a_batch_script_runs_none_of_its_values(field: str, place: Path, record_property: Record) -> None:
    plain = tried(place, field, "comment" if field == "sbatch" else "1:00:00")
    assert isinstance(plain, str)
    num_kept = 0
    for value in HOSTILE:
        script = tried(place, field, value)
        if isinstance(script, ConfigError):
            assert value not in ORDINARY or field in ("sbatch", "time"), script
            assert str(script).isprintable()
            continue
        num_kept += 1
        options, said = options_of(script), run_by_bash(place, script)
        own = {"comment", Config.sbatch_name(value) if field == "sbatch" else "comment"}
        assert set(options) - own == set(options_of(plain)) - own
        assert arrived(place, field, value, options, said), script
    assert (num_kept == 0) == (field == "time"), "tried in vain"
    record_property("figure", f"{field}: {num_kept} kept, {len(HOSTILE) - num_kept} refused, 0 commands run")


def test_every_text_that_a_job_can_be_given_is_tried_above() -> None:
    texts = {entry.name for entry in dataclasses.fields(Config) if entry.type in ("str", str, tuple[str, ...])}
    assert texts - set(FIELDS) == {"profile", "setup", "cluster"} - ({"cluster"} - texts)


def test_setup_lines_are_the_shells_and_end_where_they_end(place: Path) -> None:
    """They are run, as they say; what would swallow the lines behind them is refused."""
    script = script_of(place, Config(setup=("export A='b c'", "for i in 1 2; do\n\ttrue\ndone", "true \\")))
    assert "trap 'export SSLX_ENDED_BY_SLURM=1' TERM" in script
    run_by_bash(place, script)
    for wrong in ("echo 'a", 'echo "a', "if true; then", "echo a\x1bb", "echo $(", "a\x00b"):
        with pytest.raises(ConfigError, match="--setup") as caught:
            script_of(place, Config(setup=(wrong,)))
        assert str(caught.value).isprintable()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 0.0, -1.0, 1e300])
def test_memory_is_a_number(value: float) -> None:
    with pytest.raises(ConfigError, match="--mem-gb must be between"):
        Config(mem_gb=value)


SHARED_FILES = {
    "recipe.json": json.dumps({"name": "a\ntouch RAN\nb"}),
    "interface.toml": 'interface = "eth0; touch RAN"\n',
    "partition.toml": 'partition = "gpu\\ntouch RAN\\nx"\n',
    "python.toml": 'python = "$(touch RAN)"\n',
    "sweep.toml": '[grid]\nseed = [0, 1]\n"source.root" = ["x\\ntouch RAN\\ny", "$(touch RAN)"]\n',
}
SUBMITTED = [
    ["--", "recipe.json", "--runs", "runs"],
    *(["--profile", f"./{name}.toml", "--", *TINY, "--runs", "runs"] for name in ("interface", "partition", "python")),
    ["--array", "sweep.toml", "--", *TINY, "--runs", "runs", "--name", "r"],
    ["--", *TINY, "--runs", "a\ntouch RAN\nb"],
    ["--", *TINY, "--runs", "$(touch RAN)"],
]


@pytest.mark.parametrize("argv", SUBMITTED)
def test_shared_files_run_nothing(
    argv: list[str], place: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """What sbatch is given is run by bash, which must not touch the planted file."""
    monkeypatch.chdir(place)
    monkeypatch.setenv("SBATCH_TO", str(place / "script"))
    for name, text in SHARED_FILES.items():
        Path(name).write_text(text)
    code, err = cli.main(["submit", *argv]), capfd.readouterr().err
    assert code in (0, 64), err
    assert all(line.startswith("error: ") for line in err.splitlines()), err
    if Path("script").exists():
        environ = {"PATH": f"{place / 'bin'}:/usr/bin:/bin", "HOME": str(place)}
        subprocess.run(["bash", "script"], env=environ, capture_output=True, check=False, timeout=120)
        assert Path("srun.said").exists()
    assert not Path("RAN").exists()


@pytest.mark.parametrize(
    ("environ", "words"),
    [
        *(({"NAME": name}, "NAME must be") for name in ("a/b", "../b", "a\nb", "-a")),
        *(({"RANKS": number}, "RANKS must be") for number in ("UID[$(touch RAN)]", "0")),
        ({"SLURM_CPUS_ON_NODE": "UID[$(touch RAN)]"}, "RANKS must be"),
    ],
)
def test_the_script_without_submitit_runs_none_of_its_values(environ: dict[str, str], words: str, place: Path) -> None:
    done = bash(place, str(ROOT / "slurm" / "pretrain.sbatch"), "simclr_digits", **environ)
    assert (done.returncode, words in done.stderr) == (64, True), done.stderr
    assert done.stderr.count("\n") == 1
    assert not (place / "RAN").exists()


def test_the_script_without_submitit_passes_odd_values_on(place: Path) -> None:
    """To a stub of Python that writes its arguments down, through srun's bash."""
    (place / "bin" / "srun").write_text('#!/bin/bash\nshift 2; exec "$@"\n')
    python = place / "py thon"
    python.write_text("#!/bin/bash\nprintf '%s\\0' \"$@\" >> said\n")
    python.chmod(0o755)
    names = {"NAME": "a $(touch RAN);'\"`b", "RUNS": "x; touch RAN", "PYTHON": str(python)}
    slurm = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n1", "SLURM_JOB_NUM_NODES": "1", "SLURM_NODEID": "0"}
    argv = [str(ROOT / "slurm" / "pretrain.sbatch"), "simclr_digits", "--source.root", "$(touch RAN)"]
    done = bash(place, *argv, **names, **slurm)
    assert (done.returncode, done.stderr) == (0, "")
    said = (place / "said").read_text().split("\0")
    assert said.count("$(touch RAN)") == 1
    assert said.count(names["NAME"]) == 1
    assert said.count(str(place / names["RUNS"])) == 1
    assert not (place / "RAN").exists()
