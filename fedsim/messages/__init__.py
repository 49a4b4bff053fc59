"""What is sent to clients and what comes back: cohorts, replies, their admission."""
