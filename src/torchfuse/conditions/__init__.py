"""Which candidates are exact: on what was recorded, on other branches, for other methods."""
