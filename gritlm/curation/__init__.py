"""From raw data to a training set."""
