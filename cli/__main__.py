"""`python -m cli`: the `regraft` command where its script is not on the path."""

from cli.main import main

main()
