"""`python -m hydraopt_jax.cli`."""

from hydraopt_jax.cli import main

if __name__ == "__main__":
    # a child process of a job imports this module, too
    main()
