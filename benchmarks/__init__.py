"""Side by side: what pytracker costs, and what its peers cost, on the same gradients in the same run."""
