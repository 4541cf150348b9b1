"""What a person sees of a run: TensorBoard, the console, curves."""
