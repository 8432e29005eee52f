"""One training loop; a method is a batch builder and a loss."""
