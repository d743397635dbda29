"""Files of settings of every kind, paths and names in them: read, or refused in one line and little time."""

import dataclasses
import json
import time
import tomllib
from pathlib import Path

import pytest

from kit.processes import Record, is_one_line
from kit.python import python
from sslx import cli, config
from sslx.cluster.allocation import load_submit
from sslx.config import flags, sweeps
from sslx.data.sources import folder
from sslx.errors import ConfigError, MissingInput

HOSTILE = {
    "deep.toml": "[" + ".".join("a" * 100_000) + "]\n",
    "inline.toml": "x = " + "{a = " * 50_000,
    "lists.toml": "x = " + "[" * 200_000,
    "tables.toml": "".join(f"[t{i}]\n" for i in range(25_000)),
    "keys.toml": "".join(f"k{i} = 1\n" for i in range(22_000)),
    "fewer_keys.toml": "".join(f"k{i} = 1\n" for i in range(4_000)),
    "number.toml": "seed = " + "9" * 5_000,
    "hex.toml": "seed = 0x" + "f" * 100_000,
    "deep.json": "[" * 200_000,
    "objects.json": '{"a":' * 40_000 + "1" + "}" * 40_000,
    "text.json": json.dumps({"name": "x" * 200_000}),
    "pairs.json": json.dumps([["seed", i] for i in range(10_000)]),
    "list.json": json.dumps({"encoder": {"channels": [1] * 50_000}}),
    "lists.json": json.dumps({"encoder": {"channels": [[1]]}}),
    "half.json": '{"name": "\\ud800"}',
    "nul.json": '{"data": {"root": "a\\u0000b"}}',
    "flag.toml": 'name = "--help"\n',
    "key.toml": '"a b" = 1\n',
    "large.toml": "#" * 300_000,
    "long_key.toml": f"{'a' * 1000} = 1\n",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_file_is_refused_in_one_line_at_once(name: str, tmp_path: Path, record_property: Record) -> None:
    (tmp_path / name).write_text(HOSTILE[name])
    start = time.process_time()
    with pytest.raises(ConfigError) as caught:
        config.load([str(tmp_path / name)])
    seconds = time.process_time() - start
    assert seconds < 2
    record_property("figure", f"{name} {1e3 * seconds:.0f} ms")
    words = str(caught.value)
    assert (words.isprintable(), name in words, len(words) < 400) == (True, True, True), words


def test_a_file_of_100_mb_costs_no_memory(tmp_path: Path) -> None:
    """A process of its own, whose peak is known; without torch, which takes 500 MiB."""
    with open(tmp_path / "a.json", "wb") as file:
        file.truncate(100 << 20)
    code = (
        "import sys; from pathlib import Path; from sslx.config import flags\n"
        "try: flags.read(Path(sys.argv[1]))\n"
        "except ValueError as error: print(error)\n"
        "print(*(line.split()[1] for line in open('/proc/self/status') if line.startswith('VmHWM')))"
    )
    words, peak_kib = python("-c", code, tmp_path / "a.json").stdout.splitlines()
    assert words.endswith("has more than 262,144 bytes")
    assert int(peak_kib) < 60 * 1024


@pytest.mark.parametrize("coding", ["utf-8", "utf-8-sig"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_what_editors_write_is_read(coding: str, end: str, tmp_path: Path) -> None:
    lines = ['runs = "größe"', "seed = 3", "[data]", "size = 32", ""]
    (tmp_path / "UPPER.TOML").write_bytes(end.join(lines).encode(coding))
    read = config.load([str(tmp_path / "UPPER.TOML")])
    assert (read.name, read.runs, read.seed, read.data.size) == ("UPPER", Path("größe"), 3, 32)
    saved = json.dumps({"seed": 3, "data": {"size": 32}}, indent=1).replace("\n", end)
    (tmp_path / "a.JSON").write_bytes(saved.encode(coding))
    read = config.load([str(tmp_path / "a.JSON")])
    assert (read.seed, read.data.size) == (3, 32)


def test_what_is_no_recipe_is_named_as_what_it_is(tmp_path: Path) -> None:
    for name, words in (("a.yaml", "not YAML"), ("a.YML", "not YAML"), ("a.cfg", "not '.cfg'"), ("a", "not ''")):
        (tmp_path / name).write_text("seed: 1")
        with pytest.raises(ConfigError, match=rf"must be a \.toml or a saved config\.json, {words}"):
            config.load([str(tmp_path / name)])
    no_run = "run is a folder and no run: to train on the images in it, sslx pretrain --source"
    for name, words in (("run", no_run), ("b.toml", "Is a directory")):
        (tmp_path / name).mkdir()
        with pytest.raises(ConfigError, match=words):
            config.load([str(tmp_path / name)])
    with pytest.raises(MissingInput, match="no recipe"):
        config.load(["x" * 50_000])


def test_home_is_home_in_every_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir("/")
    (tmp_path / "home.toml").write_text(
        'runs = "~/runs"\n[encoder]\nweights = "~/w.pt"\n[source]\nroot = "~/images"\ntest_root = "~/test"\n'
    )
    for argv in (
        ["~/home.toml"],
        ["--runs", "~/runs", "--encoder.weights=~/w.pt", "--source.root", "~/images", "--source.test-root=~/test"],
    ):
        read = config.load(argv)
        assert (read.runs, read.encoder.weights) == (tmp_path / "runs", str(tmp_path / "w.pt"))
        assert isinstance(read.source, folder.Config)
        assert (read.source.root, read.source.test_root) == (tmp_path / "images", tmp_path / "test")
        assert config.loads(config.dump(read)) == read
    (tmp_path / "p.toml").write_text('partition = "a"\narray = "~/s.toml"\npython = "~/venv/bin/python -X dev"\n')
    wanted, _ = load_submit(["--profile", "~/p.toml", "--", "simclr_digits"])
    assert (wanted.partition, wanted.array) == ("a", tmp_path / "s.toml")
    assert wanted.python_words == [str(tmp_path / "venv/bin/python"), "-X", "dev"]
    assert config.load_probe(["~/run"]).checkpoints == (tmp_path / "run",)
    assert config.load_plot(["~/run"]).checkpoint == tmp_path / "run"


def test_names_of_runs() -> None:
    good = "a größe日本 a[b] [bold]x a$(ls) a'b\"c a;b&c 100% caf\udce9 a=b,c+d".split()
    for name in ("größe 2", "x" * 200, *good):
        flags.check_name(name)
        assert config.PretrainConfig(name=name).name == name
    of_controls = ["a\nb", "a\rb", "a\x1b[31mb", "a\u202eb", "a\u2028b", "\t"]
    for name in ("x" * 300, "é" * 101, "a/b", "..", ".", ".a", "-a", " a", "a ", *of_controls):
        with pytest.raises(ConfigError) as caught:
            config.PretrainConfig(name=name)
        assert str(caught.value).isprintable()
        assert len(str(caught.value)) < 250


def test_a_bad_name_is_one_line_wherever_it_comes_from(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.json").write_text(json.dumps({"name": "a\nb"}))
    (tmp_path / "a b .toml").write_text("seed = 1\n")
    for argv in (["--name", "x" * 300], [str(tmp_path / "a.json")], [str(tmp_path / "a b .toml")]):
        assert cli.main(["pretrain", *argv]) == 64
        is_one_line(capsys.readouterr().err, "error: --name '")


def test_many_keys_that_are_no_options_are_not_each_looked_up(tmp_path: Path) -> None:
    (tmp_path / "a.toml").write_text("seed = 1\n[optim]\n" + "".join(f"lr{i} = 1\n" for i in range(40)))
    words = r"40 of its keys are no options \(optim\.lr0, optim\.lr1, optim\.lr2, \.\.\.\)"
    with pytest.raises(ConfigError, match=words):
        config.load([str(tmp_path / "a.toml")])
    with pytest.raises(ConfigError, match="41 of its keys are no options"):
        load_submit(["--profile", str(tmp_path / "a.toml"), "--", "simclr_digits"])
    with pytest.raises(ConfigError, match="no option has a name of 100,002 characters"):
        config.load([f"--{'y' * 100_000}", "1"])


def test_sweeps_of_any_values_have_names_of_folders(tmp_path: Path) -> None:
    path = tmp_path / "s.toml"
    values = ["/data/a", "/data_a", "x\ntouch RAN\ny", "~/a b", "../c", "z" * 300]
    path.write_text(f'[grid]\nseed = [0, 1]\n"source.root" = {json.dumps(values)}\n')
    runs = sweeps.runs(path, ["--name", "r"])
    assert len({run.name for run in runs}) == 12
    assert runs[1].name.startswith("r-seed=0-root=_data_a-")
    assert len(runs[1].name) == len("r-seed=0-root=_data_a-") + 8
    assert [str(vars(run.source)["root"]) for run in runs[:3]] == values[:3]
    for run in runs:
        flags.check_name(run.name)
    path.write_text("[grid]\n" + "".join(f'"optim.lr{i}" = {list(range(10))}\n' for i in range(20)))
    with pytest.raises(ConfigError, match="100,000,000,000,000,000,000 runs are more than the 2,000"):
        sweeps.runs(path, [])


@pytest.mark.slow
def test_paths_in_a_recipe_are_bytes_under_an_ascii_locale(tmp_path: Path) -> None:
    """The run folder is the one that a UTF-8 locale would make."""
    recipe = tmp_path / "größe.toml"
    recipe.write_text('runs = "läufe"\nsteps = 1\ndevice = "cpu"\nbatch_size = 8\n[online]\nevery = 0\n', "utf-8")
    argv = ["-m", "sslx", "pretrain", recipe.name, "--encoder.channels", *"8888"]
    python(*argv, cwd=tmp_path, LC_ALL="C", PYTHONUTF8="0", PYTHONCOERCECLOCALE="0")
    assert json.loads((tmp_path / "läufe" / "größe" / "status.json").read_text())["state"] == "done"


def written(folder: Path, **recipes: str) -> Path:
    """The first of some recipes, written to a folder under their names."""
    for name, text in recipes.items():
        (folder / f"{name}.toml").write_text(text)
    return folder / f"{next(iter(recipes))}.toml"


def test_a_recipe_is_built_on_its_bases(tmp_path: Path):
    """The recipe wins over its bases, and a later base over an earlier one, value by value."""
    path = written(
        tmp_path,
        recipe='base = ["one.toml", "two.toml"]\nsteps = 3\n[optim]\nlr = 0.3\n',
        one="steps = 1\nseed = 1\nbatch_size = 32\n[optim]\nlr = 0.1\nwarmup = 0.1\nweight_decay = 0.1\n",
        two='base = "zero.toml"\nsteps = 2\nseed = 2\n[optim]\nlr = 0.2\nwarmup = 0.2\n',
        zero="seed = 0\nbatch_size = 16\n",
    )
    optim = {"lr": 0.3, "warmup": 0.2, "weight_decay": 0.1}
    assert flags.read(path) == {"steps": 3, "seed": 2, "batch_size": 16, "optim": optim}


def test_a_recipe_of_ones_own_is_built_on_one_that_comes_with_sslx(tmp_path: Path):
    path = written(tmp_path, mine='base = ["digits", "simclr_digits"]\nepochs = 7\n')
    settings, built_on = config.load([str(path)]), config.load(["simclr_digits"])
    assert dataclasses.replace(settings, name="", epochs=1) == dataclasses.replace(built_on, name="", epochs=1)
    assert (settings.name, settings.epochs) == ("mine", 7)


@pytest.mark.parametrize(
    ("recipes", "words"),
    [
        ({"a": 'base = "b.toml"', "b": 'base = "a.toml"'}, "which is built on it: remove one of the two"),
        ({"a": 'base = "a.toml"'}, "which is built on it: remove one of the two"),
        ({"a": 'base = "none"'}, "has the base 'none', which is not there: take cifar10_cpu, digits,"),
        ({"a": "base = 3"}, "has the base '3', which is not there"),
        ({"a": 'base = "b.toml"', "b": "x ="}, "b.toml cannot be read as TOML"),
    ],
)
def test_a_base_that_cannot_be_taken_is_named(recipes: dict[str, str], words: str, tmp_path: Path):
    with pytest.raises(ConfigError) as error:
        flags.read(written(tmp_path, **recipes))
    assert words in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", config.recipes())
def test_a_recipe_repeats_nothing_of_its_bases(name: str):
    own = tomllib.loads(config.recipes()[name].read_text())
    names = own.pop("base", [])
    for base in [names] if isinstance(names, str) else names:
        inherited = dict(flags.leaves(flags.read(config.recipes()["simclr_digits"].parent / "bases" / f"{base}.toml")))
        assert not [key for key, value in flags.leaves(own) if inherited.get(key, ...) == value]
