"""Config: recipes and flags, one rule of precedence, errors that say what to write instead, a round trip."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from sslx import config
from sslx.config import PretrainConfig, dump, load, loads, schema, settle
from sslx.data.sources import SourceConfig, cifar100, digits, folder, stl10, synthetic
from sslx.errors import ConfigError, MissingInput
from sslx.train.resuming import differences


@pytest.mark.parametrize("name", config.recipes())
def test_each_recipe_loads_and_says_what_it_takes(name: str):
    loaded = load([name])
    assert loaded.name == name
    assert loads(dump(loaded)) == loaded
    header = [line for line in config.recipes()[name].read_text().splitlines() if line.startswith("#")]
    assert any(f"sslx pretrain {name}" in line for line in header)
    assert any("Hardware:" in line for line in header)


def test_defaults():
    settings = load([])
    assert settings.name == "simclr_digits"
    chosen = ("augment", "method", "source", "optim", "batch_size", "epochs")  # tests/config/test_presets.py
    default = PretrainConfig(name="simclr_digits", **{name: getattr(settings, name) for name in chosen})
    assert settings == default
    assert load(["--source.name", "synthetic"]).name == "simclr_synthetic"
    assert load(["--name", "mine"]).name == "mine"


def test_a_flag_wins_over_the_file_in_every_spelling(tmp_path: Path):
    recipe = tmp_path / "mine.toml"
    recipe.write_text("epochs = 7\nbatch_size = 64\n[optim]\nlr = 0.5\nweight-decay = 1e-5\n")
    assert (load([str(recipe)]).epochs, load([str(recipe)]).name) == (7, "mine")
    for flags in (["--batch-size", "32"], ["--batch-size=32"], ["--batch_size", "32"], ["--batch_size=32"]):
        loaded = load([str(recipe), *flags, "--optim.lr=0.25"])
        assert (loaded.epochs, loaded.batch_size, loaded.optim.lr) == (7, 32, 0.25)
        assert loaded.optim.weight_decay == 1e-5
    assert load([str(recipe), "--epochs", "8", "--epochs", "9"]).epochs == 9
    assert load([str(recipe), "--name", "a=b"]).name == "a=b"
    assert load([str(recipe), "--name=a=b"]).name == "a=b"


def test_several_recipes_merge_and_the_later_wins(tmp_path: Path):
    a, b = tmp_path / "a.toml", tmp_path / "b.toml"
    a.write_text('epochs = 7\n[optim]\nlr = 0.5\nmomentum = 0.8\n[source]\nname = "stl10"\ndownload = true\n')
    b.write_text("[optim]\nlr = 0.25\n[source]\ndownload = false\n")
    loaded = load([str(a), str(b)])
    assert (loaded.epochs, loaded.optim.lr, loaded.optim.momentum) == (7, 0.25, 0.8)
    assert (vars(loaded.source)["download"], loaded.name) == (False, "b")
    b.write_text("[optim]\nlr = 0.125\n")
    assert load(["simclr_digits", str(b)]).optim.lr == 0.125


FULL = (
    "--name x --steps 5 --seed -3 --batch-norm sync --encoder.layers 1 2 3 4 --encoder.weights timm --data.size 24 "
    "--optim.betas 0.8 0.99 --source.name cifar10 --source.download --source.root ~/x --optim.weight-decay 1e-05"
).split()


@pytest.mark.parametrize("flags", [[], [*FULL, "--runs", "/tmp/some where"]])
def test_what_is_dumped_is_loaded_equal(flags: list[str], tmp_path: Path):
    """With tuples, empty tuples, paths, None, bools, negative and small numbers."""
    given = load(flags)
    assert loads(dump(given)) == given
    (tmp_path / "config.json").write_text(dump(given))
    assert load([str(tmp_path / "config.json")]) == given
    assert json.loads(dump(given))["data"]["eval_size"] is None


def test_a_saved_config_replaces_what_came_before_with_none_too(tmp_path: Path):
    saved, _ = settle(load([]), 96)
    (tmp_path / "config.json").write_text(dump(saved))
    recipe = tmp_path / "a.toml"
    recipe.write_text("steps = 3\n[source]\nroot = '/x'\n[encoder]\nlayers = [1, 1, 1, 1]\nweights = 'w.pt'\n")
    assert load([str(recipe), str(tmp_path / "config.json")]) == saved


def test_a_saved_config_of_another_version_is_one_line():
    tree = json.loads(dump(load([])))
    for text, reason in (
        ("", "it is empty"), ("{", "Expect"), ("{}", "it names no method"), ('{"method": [1]}', "it names no method"),
        ("[1]", "expected an object of names and values, got a list"), ("[" * 100_000, "it is nested more than 16"),
    ):  # fmt: skip
        with pytest.raises(config.DamagedConfig, match=rf"^the saved config is damaged: {reason}[^\n]*$"):
            config.loads(text)
    for text in (json.dumps(tree | {"newer": 1}), json.dumps(tree | {"epochs": 0})):
        with pytest.raises(ConfigError, match=r"^the saved config is not of this version of sslx .*[^\n]$"):
            loads(text)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--epohcs", "3"], ["--epohcs", "Perhaps you meant", "--epochs"]),
        (["--optim.weight-deacy", "3"], ["--optim.weight-deacy", "--optim.weight-decay"]),
        (["--data.bakend=dali"], ["--data.bakend", "--data.backend"]),
        (["--optim.name", "lasr"], ["invalid choice 'lasr'", "'lars', 'sgd', 'adamw'"]),
        (["--epochs", "many"], ["--epochs", "'many'"]),
        (["--epochs"], ["Missing value", "--epochs"]),
        (["--encoder.layers", "1", "x"], ["--encoder.layers"]),
    ],
)
def test_a_wrong_flag_is_explained_once(flags: list[str], words: list[str], capfd: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit):
        load(flags, quiet=True)
    assert capfd.readouterr() == ("", "")
    with pytest.raises(SystemExit) as exit:
        load(flags)
    assert exit.value.code == 2
    said = capfd.readouterr()
    assert said.out == ""
    for word in words:
        assert word in " ".join(said.err.replace("│", " ").split()), said.err
    assert said.err.count("For full helptext") == 1
    assert "sslx pretrain --help" in said.err


def test_a_wrong_key_in_a_recipe_is_explained_with_the_recipes_name(tmp_path: Path):
    (tmp_path / "a.toml").write_text('method = "dino"\n[optim]\nweigth_decay = 0.1\n')
    with pytest.raises(ConfigError) as error:
        load([str(tmp_path / "a.toml")])
    assert (
        "a.toml sets what is no option: method (did you mean method.name?), optim.weigth_decay "
        "(did you mean optim.weight_decay?); sslx pretrain --help-all lists all"
    ) in str(error.value)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--epochs 0", "--epochs must be at least 1, not 0"),
        ("--steps 0", "--steps must be at least 1, not 0"),
        ("--batch-size -8", "--batch-size must be at least 1, not -8"),
        ("--num-micro-batches 0", "--num-micro-batches, --num-grad-cache-chunks and --ranks must be at least 1"),
        ("--num-grad-cache-chunks 0", "--num-micro-batches, --num-grad-cache-chunks and --ranks must be at least 1"),
        ("--ranks 0", "--num-micro-batches, --num-grad-cache-chunks and --ranks must be at least 1"),
        ("--num-micro-batches 2 --num-grad-cache-chunks 2", "both cut the batch: give one of them"),
        ("--name a/b", "--name 'a/b' must be a folder name without slashes; --runs says where"),
        ("--data.size 4", "--data.size must be at least 8 pixels, not 4"),
        ("--data.max-bad 2", "--data.max-bad must be a fraction in [0, 1], not 2.0"),
        ("--data.threads -1", "--data.threads must be 0 or more, not -1"),
        ("--method.temperature 0", "simclr needs temperature > 0, got 0.0: change --method.temperature"),
        ("--optim.lr -1", "expected optim.lr to be a positive number, got -1.0"),
        ("--optim.betas 0.5 1", "optim.betas"),
        ("--checkpoint.keep 0", "checkpoint.keep"),
        ("--log.every 0", "log.every"),
        ("--augment.flip 2", "flip"),
        ("--augment.max-angle 200", "augment.max_angle must be above 0 and at most 180 degrees, not 200.0"),
    ],
)
def test_what_a_config_refuses_is_a_config_error_of_one_line(flags: str, words: str, capfd: pytest.CaptureFixture[str]):
    """tyro catches ValueErrors of constructors, frames them and exits: ours must pass."""
    with pytest.raises(ConfigError) as error:
        load(flags.split())
    assert words in str(error.value)
    assert "\n" not in str(error.value)
    assert capfd.readouterr() == ("", "")


def test_unknown_recipes_and_methods_suggest(tmp_path: Path):
    with pytest.raises(
        MissingInput, match=r"no recipe 'simclr_digit': did you mean simclr_digits\? sslx recipes lists"
    ):
        load(["simclr_digit"])
    with pytest.raises(MissingInput, match="does not exist; sslx recipes lists those that have a name"):
        load([str(tmp_path / "no.toml")])
    for flags in (["--method.name", "simclrr"], ["--method.name=simclrr"]):
        with pytest.raises(ConfigError, match=r"--method.name 'simclrr' is unknown: did you mean simclr\?"):
            load(flags)
    for data, words in (
        (b"epochs = ", ""),
        (b"[1, 2", ""),
        (b"\0", ""),
        ("ü".encode("utf-16"), "it is UTF-16"),
        (b"a = 1\n\xfc", "byte 6 is not UTF-8"),
    ):
        (tmp_path / "a.toml").write_bytes(data)
        with pytest.raises(ConfigError, match=f"a.toml cannot be read as TOML: {words}"):
            load([str(tmp_path / "a.toml")])
    (tmp_path / "a.json").write_text("[1, 2]")
    with pytest.raises(ConfigError, match=r"a.json cannot be read as JSON: "):
        load([str(tmp_path / "a.json")])


def test_differences_are_in_flag_notation():
    ours = load(["--optim.lr", "0.1", "--steps", "3", "--name", "a", "--source.root", "/x", "--batch-norm", "sync"])
    theirs = load(["--source.name", "folder", "--encoder.weights", "w.pt", "--name", "b"])
    norm, steps = "--batch-norm local -> sync", "--steps None -> 3"
    others = ["--encoder.weights w.pt -> None", "--name b -> a", "--source.root None -> /x"]
    assert differences(ours, theirs) == [norm, *others, steps]
    assert differences(ours, theirs, ["name", "source", "encoder", "optim.lr", "step"]) == [norm, steps]
    assert differences(ours, loads(dump(ours))) == []


@pytest.mark.parametrize(
    ("args", "source"),
    [
        (["--source.root", "/x"], "folder"),
        (["--source.root=/x", "--epochs", "3"], "folder"),
        (["--source.name=stl10", "--source.root", "/x"], "stl10"),
        (["simclr_cifar10", "--source.root", "/x"], "cifar10"),
        (["simclr_imagenet", "--source.root", "/x"], "folder"),
        ([], "digits"),
    ],
)
def test_a_root_alone_is_a_folder_of_images(args: list[str], source: str):
    """And one beside a recipe's source is that source's."""
    loaded = load(args)
    assert loaded.source.name == source
    assert loads(dump(loaded)) == loaded


def test_a_root_alone_is_a_folder_of_images_to_probe_on_too():
    digits, cifar = load([]), load(["simclr_cifar10"])
    assert config.load_probe(["runs/a", "--source.root=/x"], digits).source.name == "folder"
    assert config.load_probe(["runs/a", "--source.root", "/x"], cifar).source.name == "cifar10"
    assert config.load_probe(["runs/a"], digits).source.name == "digits"


def test_probing_flags_replace_fields_of_the_runs_images():
    run = load(["--source.name", "folder", "--source.root", "/x", "--data.size", "48"])
    probe = config.load_probe(["runs/a", "--source.test-root", "/y", "--no-baselines"], run)
    assert (probe.checkpoints, probe.baselines) == ((Path("runs/a"),), False)
    assert probe.data == run.data
    assert isinstance(run.source, folder.Config)
    assert probe.source == dataclasses.replace(run.source, test_root=Path("/y"))
    assert config.load_probe(["runs/a", "--source.name", "stl10"], run).source == stl10.Config()
    plot = config.load_plot(["--num-points", "50", "runs/a"])
    assert (plot.checkpoint, plot.num_points) == (Path("runs/a"), 50)
    with pytest.raises(SystemExit):
        config.load_plot([])


def test_configs_of_older_schemas_are_migrated_and_newer_ones_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """By a schema whose only change is that ``seed`` was called ``random_seed`` once."""
    today = json.loads(dump(load(["--seed", "7"])))
    assert today["schema"] == schema.SCHEMA
    old = {"random_seed": 7, **{key: value for key, value in today.items() if key not in ("schema", "seed")}}
    renamed = {"random_seed": "seed"}
    monkeypatch.setitem(schema.MIGRATIONS, 1, lambda tree: {renamed.get(key, key): tree[key] for key in tree})

    def from_a_file(text: str) -> PretrainConfig:
        (tmp_path / "config.json").write_text(text)
        return load([str(tmp_path / "config.json")])

    for read in (loads, from_a_file):
        assert read(json.dumps(old)).seed == 7
        for number, words in ((schema.SCHEMA + 1, "a newer sslx wrote"), ("2", "a number from 1 to"), (0, "got 0")):
            with pytest.raises(ConfigError, match=words):
                read(json.dumps(today | {"schema": number}))


@pytest.mark.parametrize(
    ("data", "source"),
    [
        ({"source": "digits", "root": None, "splits": "auto", "num_synthetic": 4096}, digits.Config()),
        ({"source": "synthetic", "num_synthetic": 7, "download": False}, synthetic.Config(num_samples=7)),
        ({"source": "stl10", "root": "/x", "test_root": None, "download": True},
         stl10.Config(root=Path("/x"), download=True)),
        ({"source": "folder", "root": "/x", "test_root": "/y", "splits": "none", "download": False},
         folder.Config(root=Path("/x"), test_root=Path("/y"), splits="none")),
        ({"root": "/x"}, folder.Config(root=Path("/x"))),
        ({}, digits.Config()),
    ],
)  # fmt: skip
@pytest.mark.parametrize("number", [None, 2])
def test_the_source_of_older_schemas_becomes_a_section_of_its_own(
    data: dict[str, Any], source: SourceConfig, number: int | None, tmp_path: Path
) -> None:
    tree = {key: value for key, value in json.loads(dump(load([]))).items() if key not in ("schema", "source")}
    tree["data"] |= data | {"size": 24}
    tree |= {} if number is None else {"schema": number}
    (tmp_path / "config.json").write_text(json.dumps(tree))
    for loaded in (loads(json.dumps(tree)), load([str(tmp_path / "config.json")])):
        assert (loaded.source, loaded.data.size) == (source, 24)
    assert load([str(tmp_path / "config.json"), "--source.name", "cifar100"]).source == cifar100.Config()


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("--data.root /x", "--data.root is now --source.root"),
        ("--accumulate 2", "--accumulate is now --num-micro-batches"),
        ("--online.bank=20", "--online.bank is now --online.num-references"),
        ("--data.source=stl10", "--data.source is now --source.name"),
        ("--data.no-download", "--data.no-download is now --source.download"),
        ("--data.num_synthetic 7", "--data.num-synthetic is now --source.num-samples"),
    ],
)
def test_a_flag_that_was_renamed_is_named(old: str, new: str, tmp_path: Path) -> None:
    for call in (load, config.load_probe, config.load_plot):
        with pytest.raises(ConfigError, match=rf"^{new}$"):
            call([*(["runs/a"] if call is not load else []), *old.split()])
    (tmp_path / "a.toml").write_text('[data]\nsource = "stl10"\n')
    with pytest.raises(ConfigError, match=r"data\.source \(it is now source\.name\)"):
        load([str(tmp_path / "a.toml")])


def test_a_flag_of_another_source_is_named_with_that_source() -> None:
    for args in (["--source.test-root", "/x"], ["simclr_digits", "--source.root", "/x", "--source.name", "digits"]):
        with pytest.raises(ConfigError, match=r"is not an option of the source digits: it is one of .*folder"):
            load(args)
    with pytest.raises(ConfigError, match=r"--source.name 'fodler' is unknown: did you mean folder\?"):
        load(["--source.name", "fodler"])


def test_another_source_than_the_recipes_brings_its_own(tmp_path: Path) -> None:
    (tmp_path / "a.toml").write_text('[source]\nroot = "/x"\nname = "folder"\nsplits = "none"\n')
    recipe = str(tmp_path / "a.toml")
    assert load([recipe, "--source.name", "stl10"]).source == stl10.Config()
    assert load([recipe, "simclr_cifar10"]).source.name == "cifar10"
    again = load(["simclr_cifar10", recipe, "--source.root", "/y"]).source
    assert again == folder.Config(root=Path("/y"), splits="none")
    for args in ("--source.root /z --source.name folder", "--source.name folder --source.root /z"):
        assert load(["simclr_cifar10", *args.split()]).source == folder.Config(root=Path("/z"))


def test_counts_of_older_schemas_have_their_names_of_today() -> None:
    tree = json.loads(dump(load([]))) | {"schema": 3, "accumulate": 2, "grad_cache_chunks": 1}
    for name in ("num_micro_batches", "num_grad_cache_chunks"):
        del tree[name]
    tree["health"] = {"every": 7, "samples": 64}
    for every, expected in ((0, 0), (20, load([]).online.every)):  # which was in epochs
        tree["online"] = {"every": every, "bank": 99, "queries": 98}
        migrated = loads(json.dumps(tree))
        assert (migrated.num_micro_batches, migrated.num_grad_cache_chunks) == (2, 1)
        assert (migrated.health.every, migrated.health.num_samples) == (7, 64)
        online = migrated.online
        assert (online.every, online.num_references, online.num_queries) == (expected, 99, 98)


def test_every_schema_has_a_way_to_the_next() -> None:
    assert sorted(schema.MIGRATIONS) == list(range(1, schema.SCHEMA))
