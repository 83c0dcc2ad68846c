"""Choosing: many candidates from one reading, their evaluation by the user's own means, and the choice."""
