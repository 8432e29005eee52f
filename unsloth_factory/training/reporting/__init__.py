"""What a training says of itself: lines, bars, metrics.jsonl and the loss plot."""
