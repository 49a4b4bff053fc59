"""Studies: runs that belong together, what they show beside each other, and which step is best.

A study folder holds one run folder per cell (a variant of a scenario, and a seed). What is finished
is never run again, whatever the study asks next.
"""
