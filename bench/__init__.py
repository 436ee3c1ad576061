"""Side by side with the libraries people would run instead."""
