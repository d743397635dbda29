"""sslx_kernels: losses of self-supervised learning on tensors.  Imports torch only, never sslx."""
