"""From the states of two models to what differs between them."""
