"""What is seen of a run: metrics, console, TensorBoard, Weights & Biases, Prometheus, and the health of its processes."""
