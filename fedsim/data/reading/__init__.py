"""Tables and images of a user's own: what was found in them, and how they are read."""
