"""Text, quality, latency and the report."""
