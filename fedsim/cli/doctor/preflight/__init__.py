"""`fedsim doctor --deployment`: what a node's engineer should know before any run."""
