"""Offline agents: one file an algorithm, S seeds as one batch (`stack`)."""
