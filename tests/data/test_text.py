"""Texts with images: the caption of a sample depends on the seed, the epoch and the sample alone, on every backend."""

import os
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sslx import cli
from sslx.data import Config, Loader, tokenizers, training
from sslx.data.facts import Facts
from sslx.data.sources import Files, Source
from sslx.data.text import TextSpec
from sslx.data.views import Augment, ViewSpec
from sslx.distributed import Ranks
from sslx.errors import ConfigError, DataError

CAPTIONS = (("a cat", "une chatte", "eine Katze"), ("ein Käfer, groß",), ("", "🦉"), ("x" * 100, "an owl"))
NUM = 12
LENGTH = 20


def captions_of(index: int) -> tuple[str, ...]:
    return CAPTIONS[index % len(CAPTIONS)]


def facts() -> Facts:
    return Facts(num_samples=NUM, size=16, captions=[captions_of(i) for i in range(NUM)])


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Source:
    """Images, of which number 5 is damaged."""
    from PIL import Image

    folder, rng = tmp_path_factory.mktemp("images"), np.random.default_rng()
    paths = [str(folder / f"{i}.png") for i in range(NUM)]
    for path in paths:
        Image.fromarray(rng.integers(0, 256, (20, 20, 3), dtype=np.uint8)).save(path)
    os.truncate(paths[5], 60)
    return Files(name="files", facts=facts(), paths=paths)


def loader(source: Source, backend: Any = "torchvision", *, rank: int = 0, world_size: int = 1) -> Loader:
    ranks = Ranks(device=torch.device("cpu"), rank=rank, world_size=world_size)
    text = TextSpec(length=LENGTH)
    config = Config(backend=backend, threads=int(backend == "dali"), max_bad=0.5)
    spec = ViewSpec(size=16, augment=Augment())
    return training(config, source, [spec], batch_size=6, seed=3, text=text, ranks=ranks, dtype=torch.float32)


def decoded(tokens: torch.Tensor) -> str:
    """The text of (L,) tokens of the tokenizer utf8, as its docstring describes them."""
    numbers = tokens.tolist()
    assert numbers[0] == 1
    content = numbers[1 : numbers.index(2)] if 2 in numbers else numbers[1:]
    assert set(numbers[len(content) + 2 :]) <= {0}
    return bytes(number - 3 for number in content).decode(errors="ignore")


@pytest.mark.parametrize("backend", ["dali", "torchvision", "resident"])
def test_every_sample_has_one_of_its_captions_and_in_time_each_of_them(files: Source, backend: str) -> None:
    both, seen = loader(files, backend), Counter[tuple[int, str]]()
    halves = [loader(files, backend, rank=rank, world_size=2) for rank in (0, 1)]
    for _ in range(20):
        batch, parts = next(both), [next(half) for half in halves]
        assert batch.text is not None
        assert (batch.text.shape, batch.text.dtype) == ((6, LENGTH), torch.int64)
        by_sample = {int(i): row for part in parts for i, row in zip(part.index, part.text, strict=True)}
        for i, row in zip(batch.index.tolist(), batch.text, strict=True):
            assert torch.equal(row, by_sample[i])
            seen[i, decoded(row)] += 1
    assert 5 in both.bad
    for i in range(NUM):
        texts = {text for j, text in seen if i == j}
        if i == 5:  # another image takes its place, with its own caption
            assert texts & {caption[: LENGTH - 2] for of_one in CAPTIONS for caption in of_one}
        else:
            assert texts == {caption.encode()[: LENGTH - 2].decode(errors="ignore") for caption in captions_of(i)}


def test_a_restart_goes_on_with_the_same_captions_and_others_are_refused(files: Source) -> None:
    whole, first, second = loader(files), loader(files), loader(files)
    expected = [next(whole).text for _ in range(5)]
    for text in expected[:3]:
        assert torch.equal(next(first).text, text)
    second.load_state_dict(first.state_dict())
    for text in expected[3:]:
        assert torch.equal(next(second).text, text)
    changed = replace(files, facts=replace(files.facts, captions=[("other",)] * NUM))
    with pytest.raises(DataError, match="other images"):
        loader(changed).load_state_dict(first.state_dict())


def test_images_without_texts_are_refused_and_parts_of_a_source_keep_theirs(files: Source) -> None:
    with pytest.raises(ConfigError, match="trains on images with texts, and those of files have none"):
        loader(replace(files, facts=replace(files.facts, captions=None)))
    assert files.take(np.array([3, 0])).facts.captions == [CAPTIONS[3], CAPTIONS[0]]
    assert tokenizers.available() == ("utf8",)
    with pytest.raises(ConfigError, match="the tokenizer 'utf9' is unknown: did you mean utf8"):
        tokenizers.build("utf9")


SOURCE = '''
"""Noise with texts."""
import numpy as np
from dataclasses import dataclass
from sslx.data.facts import Facts
from sslx.data.sources import Pixels, SourceConfig

@dataclass(frozen=True, kw_only=True)
class Config(SourceConfig):
    name: str = "noise"

    def build(self, split, context):
        pixels = np.random.default_rng(0).integers(0, 256, (16, 16, 16, 3), dtype=np.uint8)
        captions = [(f"noise {i}", f"number {i}") for i in range(16)]
        return Pixels(name="noise", facts=Facts(num_samples=16, size=16, captions=captions), pixels=pixels)
'''
METHOD = '''
"""Images and texts, pulled together: an encoder beside a bag of tokens."""
from dataclasses import dataclass, replace
from torch import nn
from sslx.data import tokenizers
from sslx.data.text import TextSpec
from sslx.methods import base
from sslx.methods.config import MethodConfig

@dataclass(frozen=True, kw_only=True)
class Config(MethodConfig):
    name: str = "pairs"
    length: int = 12
    num_views = 1

    def inputs(self, augment, size):
        return replace(super().inputs(augment, size), text=TextSpec(length=self.length))

    def build(self, encoder):
        return Method(encoder)

class Method(base.Method):
    def __init__(self, encoder):
        super().__init__(encoder)
        self.words = nn.EmbeddingBag(tokenizers.build("utf8").num_tokens, encoder.dim)

    def embed(self, batch):
        return base.Embedded((self.encoder(batch.views[0]), self.words(batch.text)))

    def loss(self, embedded):
        images, texts = map(base.full_precision, embedded.compared)
        return base.Step((images - texts).square().mean())
'''


@pytest.mark.soak
def test_a_method_of_ones_own_trains_on_pairs_and_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "noise_with_texts.py").write_text(SOURCE)
    (tmp_path / "pairs_method.py").write_text(METHOD)
    flags = f"--source.name {tmp_path}/noise_with_texts.py --method.name {tmp_path}/pairs_method.py --name run"
    flags += f" --runs {tmp_path} --batch-size 8 --num-micro-batches 2 --steps 4 --checkpoint.every 2 --device cpu"
    flags += " --encoder.layers 1 1 1 1 --encoder.channels 8 8 8 8 --data.threads 0 --online.every 0 --health.every 0"
    assert cli.main(["pretrain", *flags.split()]) == 0, capsys.readouterr().err
    last = tmp_path / "run" / "checkpoints" / "step_4"
    weights = (last / "encoder.safetensors").read_bytes()
    shutil.rmtree(last)
    assert cli.main(["resume", str(tmp_path / "run")]) == 0, capsys.readouterr().err
    assert (last / "encoder.safetensors").read_bytes() == weights
