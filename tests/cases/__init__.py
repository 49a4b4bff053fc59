"""Reduced cases: what users did, what happened, and what must happen instead."""
