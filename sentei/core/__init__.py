"""The ground floor: what a selection is, how rules make one, what it means and what it costs."""
