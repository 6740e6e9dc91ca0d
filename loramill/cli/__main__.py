"""`python -m loramill.cli` is the command `loramill`."""

from loramill.cli import main

main()
