"""How fast and how long: the learning rate over the steps, and a training that has to end by a time."""
