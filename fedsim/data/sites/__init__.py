"""Data that lie at sites of their own: each is read there, and all agree on what they hold."""
