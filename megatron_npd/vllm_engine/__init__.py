"""The one door to vLLM: an engine that tells the logprobs of what it samples, and swaps its weights in place."""
