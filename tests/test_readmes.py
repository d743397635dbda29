"""The READMEs: links and pictures lead somewhere, commands parse, and the first one stays short."""

import re
import shlex
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from kit import full_batch, tiny
from kit.full_batch import RunOnRanks
from sslx import cli, config, optim
from sslx.cluster.allocation import load_submit
from sslx.commands import compare, export
from sslx.config import parser
from sslx.errors import UserError
from sslx.methods.base import Embedded
from sslx.train.step import train_step

ROOT = Path(__file__).parents[1]
READMES = [
    ROOT / name
    for name in subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "*.md"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    ).stdout.splitlines()
]  # fmt: skip
LINK = re.compile(r"""\]\(([^)\s]+)|(?:src|href)="([^"]+)""")
FENCE = re.compile(r"^( *)```bash\n(.*?)^\1```", re.MULTILINE | re.DOTALL)


def commands() -> list[str]:
    """Every shell line of a README that calls sslx, from "sslx" on, without its comment."""
    lines = [line for path in READMES for _, block in FENCE.findall(path.read_text()) for line in block.splitlines()]
    calls = [match[1] for line in lines if (match := re.search(r"(?:^|-m )(sslx .*)", line.strip()))]
    return sorted({call.split(" # ")[0].strip() for call in calls})


def anchors(path: Path) -> set[str]:
    """What GitHub names the headings of a file by."""
    headings = re.findall(r"^#+ (.*)", path.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_the_first_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) < 200


@pytest.mark.parametrize("path", READMES, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_and_pictures_lead_somewhere(path: Path):
    for found in LINK.findall(path.read_text()):
        target, _, anchor = "".join(found).partition("#")
        if re.match(r"[a-z]+:", target):
            continue
        leads_to = (path.parent / target).resolve() if target else path
        assert leads_to.exists(), target
        assert leads_to.is_relative_to(ROOT), target
        if anchor:
            assert anchor in anchors(leads_to), f"{target}#{anchor}"


def test_there_are_commands_to_test():
    assert len(commands()) > 15


@pytest.mark.parametrize("command", commands())
def test_a_command_of_a_readme_parses(command: str):
    _, name, *argv = shlex.split(command)
    assert name in cli.COMMANDS
    if name == "submit":
        _, argv = load_submit(argv)
    if name == "sweep":
        argv = argv[1:]
    parsers = {"probe": config.load_probe, "plot": config.load_plot, "verify": config.load_verify}
    parsers |= {"embed": config.load_embed, "neighbors": config.load_neighbors, "look": config.parse}
    parsers |= dict.fromkeys(("pretrain", "bench", "submit", "sweep"), config.parse)
    parsers |= {"export": lambda argv: parser.parse(export.Config, argv, "sslx export")}
    parsers |= {"compare": lambda argv: parser.parse(compare.Config, argv, "sslx compare")}
    if name in parsers:
        parsers[name](argv)
    else:
        assert not [argument for argument in argv if argument.startswith("-")], f"{name} is not parsed here"


@pytest.mark.parametrize("path", READMES, ids=lambda path: str(path.relative_to(ROOT)))
def test_commands_in_sentences_exist(path: Path):
    named = re.findall(r"`sslx\s+([a-z]\S*?)[\s`]", path.read_text())
    assert {name for name in named if name not in cli.COMMANDS} == set()


@pytest.mark.slow
def test_the_encoder_is_used_as_the_readme_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    flags = "--source.name synthetic --source.num-samples 8 --data.size 72 --data.backend torchvision --data.threads 0"
    flags += " --batch-size 4 --steps 1 --online.every 0 --health.every 0 --precision fp32 --name photos"
    assert cli.main(["pretrain", *flags.split()]) == 0
    for name in ("cat.jpg", "dog.jpg"):
        Image.effect_noise((80, 90), 50).save(name)
    with_sslx, with_timm = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    names: dict[str, Any] = {}
    exec(with_sslx, names)
    encoder, images = names["encoder"], torch.stack([names["transform"](name) for name in ("cat.jpg", "dog.jpg")])
    torch.testing.assert_close(encoder(images).detach(), names["vectors"])
    assert cli.main(["export", "runs/photos"]) == 0
    exec(with_timm, names)
    torch.testing.assert_close(names["encoder"].eval()(images), encoder(images))


def of_the_readme(code: str) -> Any:
    """The module that the README of methods shows."""
    module = ModuleType("uniformity")
    sys.modules["uniformity"] = module  # where dataclasses look
    exec(compile(code, "uniformity.py", "exec"), vars(module))
    return module


def loss_of_the_readme(code: str, z1: Tensor, z2: Tensor) -> Tensor:
    method = of_the_readme(code).Config(sharpness=1.5).build(tiny.identity())
    return method.loss(Embedded((z1, z2))).loss


def alignment_and_uniformity(z1: Tensor, z2: Tensor) -> Tensor:
    """By loops (arXiv 2005.10242, section 4.1)."""
    u1, u2 = ([row / row.square().sum().sqrt() for row in z] for z in (z1, z2))
    near = [(a - b).square().sum() for a, b in zip(u1, u2, strict=True)]
    potentials = [(-1.5 * (a - b).square().sum()).exp() for i, a in enumerate(u1) for j, b in enumerate(u1) if i != j]
    return sum(near) / len(near) + (sum(potentials) / len(potentials)).log()


def test_the_method_of_the_readme_is_the_papers_on_several_ranks_and_trains(
    ranks: RunOnRanks, generator: torch.Generator
):
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "sslx" / "methods" / "README.md").read_text(), re.DOTALL)
    inputs = torch.randn(2, 6, 5, generator=generator, dtype=torch.float64).unbind()
    weight = torch.randn(5, 4, generator=generator, dtype=torch.float64)
    for world_size in (1, 2):
        bugs = ["all_gather_grad", "sum_over_ranks_grad"]
        loss = partial(loss_of_the_readme, code)
        full_batch.check(ranks, world_size, loss, alignment_and_uniformity, inputs, weight, bugs=bugs)
    method = tiny.build(of_the_readme(code).Config())
    optimizer, images = optim.build(optim.Config(name="sgd", lr=0.03), method), tiny.batch(method, generator)
    losses = [float(train_step(method, [images], optimizer, 0.0, None)["loss"]) for _ in range(20)]
    assert losses[-1] < losses[0] - 0.1


@pytest.mark.parametrize("options", [["--encoder.nam", "resnet50"], ["--method.name", "bjol"]])
def test_a_wrong_option_would_be_found(options: list[str]):
    with pytest.raises((SystemExit, UserError)):
        config.parse(["--source.root", "PHOTOS", *options], quiet=True)


def test_the_recipe_in_the_readme_is_short_and_trains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    (text,) = re.findall(r"```toml\n(.*?)```", (ROOT / "sslx" / "recipes" / "README.md").read_text(), re.DOTALL)
    assert len(text.splitlines()) < 15
    Path("mine.toml").write_text(text)
    settings = config.parse(["mine.toml"])
    assert (settings.name, settings.epochs, settings.optim.lr) == ("mine", 20, 0.2)
    assert cli.main(["pretrain", "mine.toml", "--steps", "1", "--batch-size", "16", "--online.every", "0"]) == 0
