"""The configuration: dataclasses, recipes, flags, and values chosen for options that none of them sets."""

from typing import TYPE_CHECKING

from sslx import lazy

if TYPE_CHECKING:
    from sslx.config.embed import EmbedConfig as EmbedConfig
    from sslx.config.embed import NeighborsConfig as NeighborsConfig
    from sslx.config.embed import PlotConfig as PlotConfig
    from sslx.config.embed import load_embed as load_embed
    from sslx.config.embed import load_neighbors as load_neighbors
    from sslx.config.embed import load_plot as load_plot
    from sslx.config.flags import recipes as recipes
    from sslx.config.pretrain import DamagedConfig as DamagedConfig
    from sslx.config.pretrain import PretrainConfig as PretrainConfig
    from sslx.config.pretrain import ProbeConfig as ProbeConfig
    from sslx.config.pretrain import VerifyConfig as VerifyConfig
    from sslx.config.pretrain import dump as dump
    from sslx.config.pretrain import load as load
    from sslx.config.pretrain import load_probe as load_probe
    from sslx.config.pretrain import load_verify as load_verify
    from sslx.config.pretrain import loads as loads
    from sslx.config.pretrain import num_options as num_options
    from sslx.config.pretrain import parse as parse
    from sslx.config.pretrain import resumed as resumed
    from sslx.config.pretrain import settle as settle
else:  # so that type checkers know every name
    __getattr__ = lazy.names(
        __name__,
        {
            "embed": ("EmbedConfig", "NeighborsConfig", "PlotConfig", "load_embed", "load_neighbors", "load_plot"),
            "flags": ("recipes",),
            "pretrain": (
                "DamagedConfig", "PretrainConfig", "ProbeConfig", "VerifyConfig", "dump", "load",
                "load_probe", "load_verify", "loads", "num_options", "parse", "resumed",
                "settle",
            ),
        },
    )  # fmt: skip
