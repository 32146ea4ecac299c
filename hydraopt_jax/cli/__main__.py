"""`python -m hydraopt_jax.cli`."""

from hydraopt_jax.cli import main

main()
