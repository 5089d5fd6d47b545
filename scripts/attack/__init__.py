"""What people and machines do to runs, files and layers that they should not; see `__main__`."""
