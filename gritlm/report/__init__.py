"""What a run has done, for people: its page and the card of its model."""
