"""The decode step's parts in Triton, for CUDA devices; each beside what torch would compute."""
