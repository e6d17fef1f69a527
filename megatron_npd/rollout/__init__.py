"""The rollout role: samples responses from a published policy version, and moves to the next when it is there."""
