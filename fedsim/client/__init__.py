"""How clients train: a trial of the user's code before round 1."""
