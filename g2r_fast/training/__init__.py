"""Reinforcement learning with dense token rewards: a loop that reads top to bottom."""
