"""The command line, one file per command: flags in, text or one JSON object out."""
