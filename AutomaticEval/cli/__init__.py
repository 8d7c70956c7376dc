"""The command line: one file a command. Parsing and printing only; everything it does, the library does."""
