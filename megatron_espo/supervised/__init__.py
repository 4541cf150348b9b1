"""The supervised loss: noise a batch of text or of demonstrations, predict what it hides."""
