"""What strategies of users remember outside of themselves, in a module that they name."""

N = 0
HISTORY = []


def length():
    return len(HISTORY)
