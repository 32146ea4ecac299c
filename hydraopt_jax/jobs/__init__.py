"""Long compressions: finished segments on disk, resumption, several processes.

`headers` checks a collection, `estimate` predicts time and memory, `place` keeps finished segments in the
store's folder, `job` runs it all, `hosts` joins processes, `progress` prints.
"""
