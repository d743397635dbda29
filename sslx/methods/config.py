"""The settings that all methods share.  Imports no torch."""

from dataclasses import dataclass

from sslx.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class MethodConfig:
    """Fields that all methods share; each method's own Config adds its name and numbers.

    Names of widths end in ``_dim``, and a queue's is ``queue_size``: ``sslx verify`` and the contract test set those.
    """

    name: str
    """Method to train with.  sslx methods describes all of them."""

    def check(self, batch_size: int, labelled: bool) -> None:
        """Raise ConfigError where the method cannot train; called before anything but the source is built.

        batch_size: samples of one loss, over all ranks.  labelled: whether the source has labels.
        """
        del labelled
        if batch_size < 2:
            raise ConfigError(f"batch norm and negatives need 2 samples or more, got a batch of {batch_size}")


def check_local_views(
    num_local: int, local_size: int | None, local_min_scale: float, local_max_scale: float, method_name: str
) -> None:
    """Raise ConfigError for numbers that make no local views; 0 of them are fine."""
    if num_local < 0 or (local_size is not None and local_size < 1):
        raise ConfigError(f"{method_name} needs num_local >= 0 and local_size >= 1, got {num_local} and {local_size}")
    if not 0 < local_min_scale <= local_max_scale <= 1:
        got = f"got {local_min_scale} and {local_max_scale}"
        raise ConfigError(f"{method_name} needs 0 < local_min_scale <= local_max_scale <= 1, {got}")
