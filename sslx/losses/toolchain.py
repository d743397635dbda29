"""The tools that fused losses and torch.compile need on a machine with a GPU."""

from sslx_kernels.toolchain import INSTALL as INSTALL
from sslx_kernels.toolchain import missing as missing
