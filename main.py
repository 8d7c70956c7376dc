"""The command line, from a clone: `python main.py --help`."""

from AutomaticEval.cli.app import main

main()
