"""Linear algebra of low-rank deltas: pure, differentiable, and never of the deltas themselves.

`decompose` has decompositions and norms of products of factors, `factorizations` their derivative rules,
`clustering` the partitions of tasks.
"""
