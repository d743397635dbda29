"""Losses: functions of embeddings that are correct for any number of ranks."""

from sslx.losses.barlow_twins import barlow_twins
from sslx.losses.diagnostics import entropy, spread
from sslx.losses.info_nce import info_nce
from sslx.losses.margin import margin_loss, pair_distances
from sslx.losses.nt_xent import nt_xent
from sslx.losses.self_distillation import self_distillation
from sslx.losses.sinkhorn import sinkhorn
from sslx.losses.sup_con import sup_con
from sslx.losses.vicreg import vicreg

__all__ = [
    "barlow_twins",
    "entropy",
    "info_nce",
    "margin_loss",
    "nt_xent",
    "pair_distances",
    "self_distillation",
    "sinkhorn",
    "spread",
    "sup_con",
    "vicreg",
]
