"""Stable-Baselines3 and TRL beside ours, run in environments of their own, and the recorder of what they reach."""
