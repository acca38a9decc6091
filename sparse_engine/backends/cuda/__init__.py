"""GPUs through cuda-python: what the backends whose library runs on a stream share. No torch."""
