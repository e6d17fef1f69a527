"""The rollout sidecar: samples responses with vLLM from a published policy version, and swaps weights in place.

The one door to vLLM: no other package imports it.
"""
