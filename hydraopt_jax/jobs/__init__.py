"""Jobs: collections that do not fit in memory, on many devices and many hosts, that go on after a kill."""
