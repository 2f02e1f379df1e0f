"""jaxllm: train, shrink, fuse and adapt language models with pure functions on JAX."""

__version__ = "0.1.0"
