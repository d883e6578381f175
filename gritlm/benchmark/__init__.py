"""Speed and memory of a training step."""
