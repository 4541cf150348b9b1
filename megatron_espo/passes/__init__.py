"""A pass over the model: its micro-batch, its shape, what the layers are told, how it runs."""
