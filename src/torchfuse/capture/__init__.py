"""Where graphs come from: a recorded run of any model that runs."""
