"""Converting checkpoints between Hugging Face and Megatron torch_dist, one layer in memory at a time."""
