"""Passes as CUDA graphs: a GPU computes a short pass faster than Python can ask for its kernels.

A pass of a size that comes again is captured once, forward and backward, on tensors that stay where
they are, and replayed from then on: one call each way instead of thousands. Sizes are rounded up,
so that few graphs serve all passes; adapters are copied into rows of a matrix, so that a graph is
anybody's. The kernels are those of the pass as written, on a few tokens more.
"""
