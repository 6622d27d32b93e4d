"""Models: loading, adapters, merging, kernels, and ChatGLM."""
