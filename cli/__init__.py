"""The command line: one file per command. Parses, calls the API, prints; no torch at import time."""
