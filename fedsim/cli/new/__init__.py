"""`fedsim new`: a project to begin with."""
