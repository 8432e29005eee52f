"""What quantising costs, and the smallest file that is good enough."""
