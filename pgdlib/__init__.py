"""Policy-Guided Diffusion, as pure functions on tensors. Import the rooms you need: `from pgdlib import edm`."""

__version__ = "0.2.0"
