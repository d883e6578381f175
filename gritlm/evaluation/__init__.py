"""From vectors to numbers."""
