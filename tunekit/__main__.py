"""`python -m tunekit`."""

from tunekit.cli import main

main()
