"""What `skipllm bench gpu` measures, and how it tells."""
