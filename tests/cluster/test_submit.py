"""``sslx submit`` up to the queue, and on this machine without one; tests/slurm has the real one."""

from pathlib import Path

import pytest

from kit.processes import TINY, is_one_line, metrics, until
from sslx import cli, config
from sslx.cluster import submit
from sslx.cluster.allocation import Config, load_submit
from sslx.config import sweeps
from sslx.errors import ConfigError, MissingInput
from sslx.runs import records


def flags(runs: Path, *more: str) -> list[str]:
    return [*TINY, "--runs", str(runs), "--name", "r", *more]


def test_sweeps(tmp_path: Path) -> None:
    path = tmp_path / "sweep.toml"
    path.write_text(
        '[grid]\nseed = [0, 1]\n[[run]]\n"optim.lr" = 0.1\n[[run]]\nbatch_size = 32\n[run.method]\ntemperature=0.5'
    )
    runs = sweeps.runs(path, flags(tmp_path))
    assert [run.name for run in runs] == [
        "r-lr=0.1-seed=0", "r-lr=0.1-seed=1",
        "r-batch_size=32-temperature=0.5-seed=0", "r-batch_size=32-temperature=0.5-seed=1",
    ]  # fmt: skip
    assert [(run.seed, run.optim.lr, run.batch_size) for run in runs][:2] == [(0, 0.1, 16), (1, 0.1, 16)]
    assert [run.batch_size for run in runs][2:] == [32, 32]
    for wrong in ("[grid]\nseed = 1\n", "[grid]\nseed = []\n", "[run]\nseed = 1\n", "run = 3\n", "run = [3]\n"):
        path.write_text(wrong)
        with pytest.raises(ConfigError, match=r"expected a table \[grid\] of lists"):
            sweeps.runs(path, flags(tmp_path))
    for wrong, words in (("run = []\n", "no run in it"), ("[grid]\nseed = [1, 1]\n", "two runs change the same")):
        path.write_text(wrong)
        with pytest.raises(ConfigError, match=words):
            sweeps.runs(path, flags(tmp_path))
    with pytest.raises(MissingInput, match=r"sweep .* does not exist"):
        sweeps.runs(tmp_path / "no.toml", flags(tmp_path))


def test_profiles_come_before_flags(tmp_path: Path) -> None:
    path = tmp_path / "here.toml"
    path.write_text('partition = "p"\nnodes = 4\nsbatch = ["exclusive"]\n')
    wanted, rest = load_submit(["--profile", str(path), "--nodes=2", "--", "simclr_digits", "--seed", "1"])
    assert (wanted.partition, wanted.nodes, wanted.sbatch) == ("p", 2, ("exclusive",))
    assert rest == ["simclr_digits", "--seed", "1"]
    for profile in ("local_cluster", "eight_gpus"):
        assert load_submit(["--profile", profile, "--", "simclr_digits"])[0].time


@pytest.mark.parametrize(
    ("argv", "code", "line"),
    [
        ("", 64, "recipe and its options after --"),
        ("--profile p -- simclr_digits", 66, "profile 'p' does not exist: choose one of eight_gpus, local_cluster"),
        ("--nodes 2 -- simclr_digits", 64, "--nodes, --array and --dry-run need --cluster slurm, not local"),
        ("--ranks-per-node 3 -- TINY", 64, "use --batch-size 15"),
        ("-- simclr_digit", 66, "did you mean simclr_digits?"),
        ("-- TINY --ranks 2", 64, "--ranks cannot be used in a job: set --nodes"),
        ("--time 1 -- TINY", 64, "must be longer than --signal-delay-s"),
    ],
)
def test_mistakes_are_one_line(
    argv: str, code: int, line: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(["submit", "--cluster", "local", *argv.replace("TINY", " ".join(TINY)).split()]) == code
    is_one_line(capsys.readouterr().err, line)
    assert not list(tmp_path.iterdir())


def test_a_machine_without_slurm_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(MissingInput, match=r"Slurm is not available here .* or use --cluster local"):
        submit.check(Config(), [config.load(flags(tmp_path))], {})


def test_a_run_that_a_live_job_owns_is_refused(tmp_path: Path) -> None:
    run = config.load(flags(tmp_path))
    (tmp_path / "r").mkdir()
    records.write_job(tmp_path / "r", records.Job(cluster="slurm", id="12", log="", code="", submitted=0.0))
    with pytest.raises(ConfigError, match=r"belongs to job 12, which is waiting \(Priority\): end it with"):
        submit.check(Config(cluster="local"), [run], {"12": ("PENDING", "Priority")})
    submit.check(Config(cluster="local"), [run], {})


@pytest.mark.slow
def test_a_job_of_this_machine_is_listed_cancelled_and_goes_on(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    argv = ["submit", "--cluster", "local", "--", *flags(tmp_path, "--steps", "1500", "--checkpoint.every", "0")]
    assert cli.main(argv) == 0
    run = tmp_path / "r"
    assert f"sslx logs -f {run}" in capfd.readouterr().out
    until(lambda: records.last_metrics(run / "metrics.jsonl").get("step", 0) >= 2, "step 2")
    assert cli.main(argv) == 64
    assert "which is running: end it with" in capfd.readouterr().err
    assert cli.main(["jobs", str(tmp_path)]) == 0
    assert "running" in capfd.readouterr().out
    assert cli.main(["cancel", str(run)]) == 0
    assert "from step" in capfd.readouterr().out
    assert (status := records.read_status(run)) is not None
    assert status.state == "preempted"
    assert records.read_stops(run)[-1].reason == "sslx cancel"
    assert cli.main([*argv, "--resume", "auto"]) == 0
    until(lambda: (s := records.read_status(run)) is not None and s.state == "done", "the end")
    assert [line["step"] for line in metrics(run)] == list(range(1, 1501))
