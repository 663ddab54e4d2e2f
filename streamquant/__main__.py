"""`python -m streamquant` is the command line."""

from streamquant.cli import main

main()
