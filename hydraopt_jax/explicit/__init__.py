"""Explicit forms (HydraOpt's) of a collection of any size, stored as plain factors.

`fitting` solves modules with all their tasks at once, `groups` divides a collection, `streaming` and
`streaming_gram` solve K = T in two passes over tasks that do not fit into memory, `group_loop` runs it all.
"""
