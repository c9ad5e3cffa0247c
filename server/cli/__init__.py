"""What a terminal speaks: `skipllm serve`, `calibrate`, `eval` and `bench`."""
