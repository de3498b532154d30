"""Kernels for CPUs with AVX-512 and bfloat16 instructions, where XLA's own products leave most of the machine idle."""
