"""The geometry lab: the claims of the lecture, one file each, measured on the machine at hand."""
