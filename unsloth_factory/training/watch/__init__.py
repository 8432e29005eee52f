"""What is looked at while training: held-out data, samples, forgetting, values that are not finite; what follows."""
