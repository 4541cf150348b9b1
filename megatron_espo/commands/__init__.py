"""The commands that use a trained model, and the start scripts' part in Python."""
