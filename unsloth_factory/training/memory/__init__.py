"""Memory: what is tried before step 1, what is watched, and what is given up when it runs out."""
