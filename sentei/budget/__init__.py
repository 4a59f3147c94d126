"""One measured budget: where the slack is, and the plan that spends it where it costs least."""
