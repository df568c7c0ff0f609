"""A notebook for every combination of parameters."""
