"""Operations of the fast engine, one a file: a Triton kernel and its plain-torch twin, forward and backward.

Tensors in, tensors out; no state, no autograd: `model/fast` calls forward and backward itself. On a GPU the Triton
kernels run, elsewhere their twins. Shapes: T tokens of a packed row, h hidden size.
"""
