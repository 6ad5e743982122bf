"""`python -m parablock`."""

from parablock.cli import main

main()
