"""Losses: functions of embeddings, right at any number of ranks."""

from sslx.losses.barlow_twins import barlow_twins
from sslx.losses.margin import margin_loss, pair_distances
from sslx.losses.nt_xent import nt_xent
from sslx.losses.sup_con import sup_con
from sslx.losses.vicreg import vicreg

__all__ = ["barlow_twins", "margin_loss", "nt_xent", "pair_distances", "sup_con", "vicreg"]
