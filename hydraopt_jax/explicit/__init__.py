"""HydraOpt's form as it is asked for, of a collection of any size, stored as plain factors.

`fitting` solves modules with all their tasks at once, `groups` divides a collection, `streaming` and
`streaming_gram` solve K = T in two passes over tasks that memory does not hold, `engine` runs it all.
"""
