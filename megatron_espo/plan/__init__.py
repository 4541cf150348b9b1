"""What a run will need, worked out without a GPU: parameters, memory, batches, operations."""
