"""Kernels: each a torch reference (the definition), and where it pays a Triton kernel behind one dispatcher."""
