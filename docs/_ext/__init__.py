"""What makes the tables of the documentation from the code."""
