"""Health: effective rank, alignment and uniformity by hand, one look at any number of ranks, and what is collapse."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from kit.full_batch import RunOnRanks, over_ranks
from sslx import distributed
from sslx.data.batch import Batch
from sslx.errors import CollapseError, ConfigError
from sslx.monitor.health import MIN_JUDGED_STEP, Config, Health, largest
from sslx.probe import geometry

NAMES = {"feature_rank", "feature_std", "feature_alignment", "feature_uniformity"}


def unit(rows: list[list[float]]) -> list[list[float]]:
    return [[value / math.sqrt(sum(v * v for v in row)) for value in row] for row in rows]


def distance(a: list[float], b: list[float]) -> float:
    return sum((u - v) ** 2 for u, v in zip(a, b, strict=True))


def by_hand(x: Tensor, y: Tensor) -> dict[str, float]:
    """All four numbers from numpy's singular values and loops over rows of floats."""
    singular = np.linalg.svd(x.numpy(), compute_uv=False)
    shares = [float(s) / float(singular.sum()) + 1e-7 for s in singular]
    a, b = unit(x.tolist()), unit(y.tolist())
    n, d = len(a), len(a[0])
    means = [sum(row[i] for row in a) / n for i in range(d)]
    stds = [math.sqrt(sum((row[i] - means[i]) ** 2 for row in a) / n) for i in range(d)]
    potentials = [math.exp(-2 * distance(a[i], a[j])) for i in range(n) for j in range(n) if i != j]
    return {
        "feature_rank": math.exp(-sum(p * math.log(p) for p in shares)),
        "feature_std": sum(stds) / d * math.sqrt(d),
        "feature_alignment": sum(map(distance, a, b)) / n,
        "feature_uniformity": math.log(sum(potentials) / len(potentials)),
    }


def agree(found: dict[str, float], expected: dict[str, float], rel: float = 1e-10) -> None:
    assert found.keys() == expected.keys() == NAMES
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, rel=1e-6 if name == "feature_std" else rel), name  # fp32


class Flat(nn.Module):
    """An encoder in fp64 whose features are the images' own numbers, and a count of the images that it saw."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = 0

    def forward(self, x: Tensor) -> Tensor:
        self.seen += len(x)
        return x.flatten(1).double()


def batch_of(*views: Tensor) -> Batch:
    return Batch(views, None, torch.arange(len(views[0])))


def images(num: int, generator: torch.Generator, side: int = 3) -> Tensor:
    return torch.randn(num, 3, side, side, dtype=torch.float64, generator=generator)


def look(*views: Tensor) -> dict[str, float]:
    return Health(Config(), None).look(Flat(), [batch_of(*views)])


@pytest.mark.parametrize("num", [5, 40])
def test_a_look_gives_the_numbers_of_the_papers(num: int, generator: torch.Generator):
    """With fewer images than features, and with more."""
    x, y = images(num, generator), images(num, generator)
    agree(look(x, y), by_hand(x.flatten(1), y.flatten(1)))


@pytest.mark.parametrize("k", [1, 2, 5])
def test_directions_that_are_filled_evenly_count_one_each(k: int, generator: torch.Generator):
    basis = torch.linalg.qr(torch.randn(6, 6, dtype=torch.float64, generator=generator))[0][:k]
    assert geometry.rank_me(3 * basis.repeat(4, 1)).item() == pytest.approx(k, rel=1e-4)
    assert geometry.rank_me(3 * basis.repeat(4, 1).float()).item() == pytest.approx(k, rel=1e-4)


def test_the_rank_of_what_is_no_feature():
    assert geometry.rank_me(torch.zeros(4, 3)).item() == pytest.approx(1, rel=1e-4)
    assert geometry.rank_me(torch.tensor([[1.0, math.inf], [0.0, 1.0]])).isnan()
    assert geometry.rank_me(torch.tensor([[1.0, math.nan], [0.0, 1.0]])).isnan()


def test_zeros_are_all_alike():
    for x in (torch.zeros(64, 16), torch.ones(64, 16)):
        assert geometry.uniformity(x).item() == pytest.approx(0, abs=1e-6)
    half = torch.cat([torch.zeros(32, 16), torch.eye(16)[:1].expand(32, 16)]).double()
    pairs = [math.exp(-2 * distance(a, b)) for i, a in enumerate(half.tolist()) for b in half.tolist()[:i]]
    assert geometry.uniformity(half).item() == pytest.approx(math.log(sum(pairs) / len(pairs)), rel=1e-10)


def of_this_rank(x: Tensor, y: Tensor, samples: int) -> dict[str, float]:
    """A look at this rank's share, in two micro-batches."""
    share = [v.chunk(distributed.world_size())[distributed.rank()] for v in (x, y)]
    batches = [batch_of(*views) for views in zip(*(v.chunk(2) for v in share), strict=True)]
    return Health(Config(num_samples=samples), None).look(Flat(), batches)


@over_ranks
def test_ranks_and_micro_batches_give_the_numbers_of_all_samples(
    world_size: int, ranks: RunOnRanks, generator: torch.Generator
):
    x, y = images(24, generator), images(24, generator)
    for found in ranks(world_size, of_this_rank, x, y, 512):
        agree(found, by_hand(x.flatten(1), y.flatten(1)))
    first = torch.cat([rank[:4] for rank in torch.arange(24).chunk(world_size)])
    for found in ranks(world_size, of_this_rank, x, y, 4 * world_size):
        agree(found, by_hand(x[first].flatten(1), y[first].flatten(1)))


def test_no_more_images_are_encoded_than_asked_for(generator: torch.Generator):
    batches = [batch_of(images(8, generator), images(8, generator)) for _ in range(3)]
    for num in (6, 16):
        Health(Config(num_samples=num), None).look(encoder := Flat(), batches)
        assert encoder.seen == 2 * num


def test_one_view_is_compared_with_its_mirror_image_and_those_of_another_size_are_left_out(generator: torch.Generator):
    x, y, small = images(7, generator), images(7, generator), images(7, generator, side=2)
    agree(look(x), by_hand(x.flatten(1), x.flip(3).flatten(1)))
    agree(look(x, small, y, small), by_hand(x.flatten(1), y.flatten(1)))


@pytest.mark.parametrize("autocast", [None, torch.bfloat16])
def test_a_look_leaves_the_encoder_as_it_was(autocast: torch.dtype | None, generator: torch.Generator):
    """Batch norm by its running statistics, which stay; each submodule's mode comes back; no graph."""
    encoder = nn.Sequential(nn.Flatten(), nn.Linear(27, 8), nn.BatchNorm1d(8), nn.Dropout(0.9))
    encoder[3].eval()
    state = {name: value.clone() for name, value in encoder.state_dict().items()}
    x = images(9, generator).float()
    features: list[Tensor] = []
    handle = encoder.register_forward_hook(lambda *seen: features.append(seen[2]))
    found = Health(Config(), autocast).look(encoder, [batch_of(x)])
    handle.remove()
    assert [part.training for part in encoder.modules()] == [True, True, True, True, False]
    torch.testing.assert_close(dict(encoder.state_dict()), state, rtol=0, atol=0)
    assert not features[0].requires_grad
    first, second = (z.double() for z in features)
    agree(found, by_hand(first, second))
    torch.testing.assert_close(features[0].float(), encoder.eval()(x), rtol=0.05, atol=0.05)


def look_at(x: Tensor) -> dict[str, float]:
    return look(x[..., None, None], x[..., None, None])


def test_features_that_are_alike_or_on_a_line_have_collapsed_and_random_ones_not(generator: torch.Generator):
    random = torch.randn(64, 12, dtype=torch.float64, generator=generator)
    positive = random.relu() + 0.1  # as after ReLU and pooling: all cosines are far above 0
    constant = positive[:1] + 1e-4 * random
    line = random[:, :1] * random[:1]
    for x, name in ((random, ""), (positive, ""), (constant, "feature_std"), (line, "feature_rank")):
        said = Health(Config(), None).warning(200, look_at(x), 0)
        assert (name in said) if name else not said


def test_embeddings_without_spread_have_collapsed(generator: torch.Generator):
    healthy = look_at(torch.randn(64, 12, dtype=torch.float64, generator=generator))
    assert not Health(Config(), None).warning(200, healthy | {"std": 0.7}, 0)
    assert "std 0.31 is below 0.5" in Health(Config(), None).warning(200, healthy | {"std": 0.31}, 0)


def test_a_collapse_is_told_once_until_it_is_over():
    looks = Health(Config(), None)
    told = [looks.warning(100 * i, {"std": std}, 0) for i, std in enumerate((0.9, 0.2, 0.1, 0.8, 0.3), 1)]
    assert [bool(line) for line in told] == [False, True, False, False, True]
    assert "collapse at step 200, not yet at step 100: std 0.2 is below 0.5" in told[1]
    assert "collapse at step 500, not yet at step 400: std 0.3" in told[4]
    assert "at step 100, at the first look" in Health(Config(), None).warning(100, {"std": 0.1}, 0)
    for word in ("--optim.lr", "--batch-size", "stop-gradient"):
        assert word in told[1]
    assert "\n" not in told[1]


def test_with_stop_a_collapse_is_an_error_that_tells_of_the_last_checkpoint():
    for saved, words in (
        (0, "there is no checkpoint"),
        (100, "the last checkpoint, step 100, is from before"),
        (150, "the last checkpoint, step 150, is perhaps from after"),
    ):
        looks = Health(Config(on_collapse="stop"), None)
        assert not looks.warning(100, {"std": 0.9}, saved)
        with pytest.raises(CollapseError, match=f"^collapse at step 200, not yet at step 100: .*; {words}$") as caught:
            looks.warning(200, {"std": 0.1}, saved)
        assert caught.value.exit_code == 77


def test_the_last_word_is_on_weights_that_are_useless(generator: torch.Generator):
    healthy = look_at(torch.randn(64, 12, dtype=torch.float64, generator=generator))
    method = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8))
    looks = Health(Config(), None)
    collapsed = healthy | {"std": 0.1}
    assert looks.last_word(MIN_JUDGED_STEP, healthy | {"std": 0.7}, method) == ""
    assert looks.last_word(MIN_JUDGED_STEP - 1, collapsed, method) == ""  # too early to have lost anything
    words = "step 40: std 0.1 is below 0.5: lower --optim.lr"
    assert words in looks.last_word(MIN_JUDGED_STEP, collapsed, method)
    with torch.no_grad():
        method[1].weight.mul_(-1e6)
    assert largest(method) == ("1.weight", 1e6)
    line = looks.last_word(3, healthy, method)
    assert "the root mean square of 1.weight is 1e+06, above 100" in line
    assert "\n" not in line
    assert largest(nn.ReLU()) == ("", 0.0)
    with pytest.raises(CollapseError, match="useless at its end, step 3: the root mean"):
        Health(Config(on_collapse="stop"), None).last_word(3, healthy, method)


@pytest.mark.parametrize("options", [{"every": -1}, {"num_samples": 1}])
def test_numbers_that_make_no_sense_are_refused(options: dict[str, int]):
    with pytest.raises(ConfigError, match=r"health.every must be 0 or more and health.num_samples at least 2"):
        Config(**options)
