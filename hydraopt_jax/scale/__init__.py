"""Collections that do not fit in memory, on many devices and many hosts."""
