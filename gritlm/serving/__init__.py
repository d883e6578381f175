"""From a trained model to vectors."""
