"""Ways to put fastattn under code that was written for other attention interfaces."""
