"""Compressions that may take long: kept on disk as they go, resumed, divided among processes.

`headers` looks at a collection first, `estimate` says what it will take, `place` keeps finished segments
where the store will be, `job` runs it all, `hosts` joins processes, `progress` tells.
"""
