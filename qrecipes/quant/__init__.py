"""Quantization arithmetic: primitives, kernels and their references. Imports only torch."""
