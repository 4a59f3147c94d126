"""What `sentei bench` measures: one file a bench, and the table of them."""
