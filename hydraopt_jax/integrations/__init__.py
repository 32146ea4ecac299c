"""Partners of a store: each module imports its partner only when it is used."""
