"""What is done in exported programs, by rewriting their graphs."""
