"""`python -m server.cli`, the same as the console script."""

from server.cli.app import main

main()
