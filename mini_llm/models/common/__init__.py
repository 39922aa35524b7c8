"""Building blocks that the architectures share: norm, rope, attention, mlp, loss.

Tensor shapes are written with one legend everywhere: B batch rows, T tokens of a row, D hidden
size, H query heads, K key/value heads, d head size, F feed-forward size, V vocabulary, N = B·T
tokens.
"""
