"""Offline agents in stacks."""
