"""Simulators: what happens to a state under an action."""
