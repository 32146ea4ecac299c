"""Linear algebra on factors of deltas: pure and differentiable; the deltas themselves are never formed.

`decompose` has decompositions and norms of products of factors, `factorizations` their derivative rules,
`subspace` leading directions by products alone, `clustering` partitions of tasks.
"""
