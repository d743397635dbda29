"""sslx_kernels: fast loss functions for self-supervised learning.  Depends on torch only, never on sslx."""
