"""What fusing decides for every pair of several hundred models, as text files, one a group."""
