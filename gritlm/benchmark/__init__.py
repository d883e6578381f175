"""Speed and memory of a training step, of the loss and of encoding."""
