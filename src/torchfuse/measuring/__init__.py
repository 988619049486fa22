"""How long a call takes: timing, profiles, and what makes figures less trustworthy."""
