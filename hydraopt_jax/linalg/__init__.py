"""Linear algebra on factors of deltas: pure and differentiable; the deltas themselves are never formed.

`decompose` has decompositions and norms of products of factors, `factorizations` their derivative rules,
`clustering` partitions of tasks.
"""
