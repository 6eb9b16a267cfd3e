"""The rooms that the scripts share. None is run by itself: the scripts at the top of the repository are."""
