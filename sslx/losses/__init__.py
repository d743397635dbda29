"""Losses: functions of embeddings, right at any number of ranks."""

from sslx.losses.nt_xent import nt_xent

__all__ = ["nt_xent"]
