"""The verbs of the command line. They import heavy modules when they run, so that --help is fast."""
