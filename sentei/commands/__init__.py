"""The verbs of the command line, one file each: what a verb says of itself, its arguments, and its work."""
