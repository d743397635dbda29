"""The config of each method: the numbers and views of its paper, and the numbers that make no sense, all refused."""

import math
from dataclasses import replace
from typing import Any

import pytest

from kit import tiny
from sslx import methods
from sslx.data.views import Augment, ViewSpec, eval_view

PAPERS: dict[str, dict[str, Any]] = {
    "barlow_twins": {"off_diagonal_weight": 0.0051, "hidden_dim": 8192, "projection_dim": 8192},
    "byol": {"target_momentum": 0.996, "hidden_dim": 4096, "projection_dim": 256},  # 3.2 and appendix B
    "dino": {
        "num_local": 8, "local_min_scale": 0.05, "local_max_scale": 0.4, "hidden_dim": 2048, "bottleneck_dim": 256,
        "output_dim": 65536, "student_temperature": 0.1, "center_momentum": 0.9, "teacher_temperature_start": 0.04,
        "teacher_temperature": 0.07, "teacher_momentum": 0.996,
    },
    "jigsaw": {"num_permutations": 1000, "tile_dim": 512, "hidden_dim": 4096},
    "mae": {"mask_ratio": 0.75, "decoder_dim": 512, "decoder_layers": 8, "normalize_target": True},
    "mocov3": {  # 4.1 and 4.2, and algorithm 1
        "temperature": 0.2, "momentum": 0.99, "hidden_dim": 4096, "projection_dim": 256, "freeze_patches": True,
    },
    "simsiam": {"hidden_dim": 2048, "projection_dim": 2048, "bottleneck_dim": 512, "stop_gradient": True},
    "swav": {  # its code's scripts for 8 views of ImageNet
        "num_local": 6, "local_min_scale": 0.05, "local_max_scale": 0.14, "temperature": 0.1, "epsilon": 0.05,
        "sinkhorn_steps": 3, "num_prototypes": 3000, "hidden_dim": 2048, "projection_dim": 128, "queue_size": 0,
        "queue_start": 15 / 200, "freeze_prototypes": 1 / 200,
    },
    "vicreg": {
        "invariance_weight": 25, "variance_weight": 25, "covariance_weight": 1, "gamma": 1, "hidden_dim": 8192,
        "projection_dim": 8192,
    },
}  # fmt: skip

AUGMENT = Augment(blur=1.0, min_scale=0.3)
VIEW = ViewSpec(size=224, augment=AUGMENT)
SECOND = ViewSpec(size=224, augment=replace(AUGMENT, blur=0.1, solarize=0.2))  # table 6 of BYOL
LOCAL_OF_DINO = ViewSpec(size=96, augment=replace(AUGMENT, blur=0.5, min_scale=0.05, max_scale=0.4))
LOCAL_OF_SWAV = ViewSpec(size=96, augment=replace(AUGMENT, min_scale=0.05, max_scale=0.14))
VIEWS = {
    **dict.fromkeys(["jigsaw", "mae", "rotation"], (VIEW,)),
    **dict.fromkeys(["simclr", "simsiam"], (VIEW, VIEW)),
    **dict.fromkeys(["byol", "mocov3"], (VIEW, SECOND)),
    "dino": (VIEW, SECOND, *[LOCAL_OF_DINO] * 8),
    "swav": (VIEW, VIEW, *[LOCAL_OF_SWAV] * 6),
}
NAN = math.nan
SHARE = (-0.1, 1.1, NAN)
POSITIVE = (0.0, NAN)
NONSENSE: dict[str, dict[str, tuple[float, ...]]] = {
    "barlow_twins": {"off_diagonal_weight": (-1.0,)},
    "byol": dict.fromkeys(["target_momentum", "second_blur", "second_solarize"], SHARE),
    "dino": {
        **{"num_local": (-1,), "local_size": (0,), "local_min_scale": (0.0, 0.5), "local_max_scale": (1.5, *POSITIVE)},
        **dict.fromkeys(["student_temperature", "teacher_temperature", "teacher_temperature_start"], POSITIVE),
        **dict.fromkeys(["teacher_warmup", "teacher_momentum", "center_momentum", "freeze_last"], SHARE),
        **dict.fromkeys(["second_blur", "local_blur", "second_solarize"], SHARE),
        "output_dim": (1,),
    },
    "jigsaw": {"num_permutations": (1, 362_881)},
    "mae": {"mask_ratio": (0.0, 1.0, NAN), "decoder_layers": (0,), "decoder_dim": (18, 100)},
    "mocov3": {"temperature": POSITIVE, **dict.fromkeys(["momentum", "second_blur", "second_solarize"], (-0.1, 1.1))},
    "siamese": {"margin": (0.0, math.inf)},
    "simclr": {"temperature": (0.0, NAN, math.inf), "projector_layers": (0,)},
    "supcon": {"temperature": (0.0, math.inf)},
    "swav": {
        **{"num_local": (-1,), "local_size": (0,), "local_min_scale": (0.2,), "queue_size": (-1,)},
        **{"temperature": POSITIVE, "epsilon": (0.01,), "sinkhorn_steps": (0,), "num_prototypes": (1,)},
        **{"queue_start": (1.1,), "freeze_prototypes": (-0.1,)},
    },
    "vicreg": dict.fromkeys(["invariance_weight", "variance_weight", "covariance_weight", "gamma"], (-1.0,)),
}


@pytest.mark.parametrize("name", PAPERS)
def test_the_numbers_are_the_papers(name: str):
    kind = methods.module(name).Config
    assert kind() == kind(**PAPERS[name])


@pytest.mark.parametrize("name", VIEWS)
def test_the_views_are_the_papers(name: str):
    kind = methods.module(name).Config
    assert kind().inputs(AUGMENT, 224).views == VIEWS[name]
    if "num_local" in PAPERS.get(name, {}):
        assert kind(num_local=0).inputs(AUGMENT, 224).views == VIEWS[name][:2]
    assert eval_view(48) == replace(VIEW, augment=None, size=48)


@pytest.mark.parametrize("name", NONSENSE)
def test_numbers_that_make_no_sense_are_refused(name: str):
    tiny.refuses(methods.module(name).Config, **NONSENSE[name])
